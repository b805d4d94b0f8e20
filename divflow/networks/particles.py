"""What networks of particles share: events `(particles, dimensions)`, distances, and features of kinds and of time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.arguments import checked_event_shape
from divflow.networks.conditioning import NetworkError, condition, time_features

__all__ = ["ParticleFeatures", "centered", "check_particles", "distances", "off_diagonal", "particle_shape"]


def particle_shape(event_shape: int | Sequence[int], network: str) -> tuple[int, int]:
    """Number of particles and of spatial dimensions.

    Raises:
        NetworkError: the event is no such thing, or one particle.
    """
    shape = checked_event_shape(event_shape)
    if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise NetworkError(
            f"{network} needs events (particles, dimensions) of at least two particles, but the event shape is {shape}"
        )
    return shape[0], shape[1]


def check_particles(x: Tensor, event_shape: tuple[int, int]) -> None:
    """Refuse particles of another number or in other dimensions.

    Raises:
        NetworkError: naming both.
    """
    if x.shape[1:] != event_shape:
        raise NetworkError(
            f"the network was built for {event_shape[0]} particles in {event_shape[1]} dimensions, x of shape "
            f"(k, {event_shape[0]}, {event_shape[1]}), but x has shape {tuple(x.shape)}; build one for particles of another number"
        )


def distances(difference: Float[Tensor, "*pairs dimensions"]) -> tuple[Tensor, Tensor]:
    """r^2 and u = sqrt(1 + r^2) of differences, `(*pairs, 1)`: a distance that is smooth where particles meet."""
    squared = difference.square().sum(dim=-1, keepdim=True)
    return squared, (1 + squared).sqrt()


def off_diagonal(x: Tensor) -> Float[Tensor, "1 particles particles 1"]:
    """One for each pair of different particles, zero for a particle and itself."""
    return (1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device))[None, :, :, None]


def centered(v: Float[Tensor, "batch particles dimensions"]) -> Float[Tensor, "batch particles dimensions"]:
    """Without the mean over particles. Of a field that is the same wherever all particles are, it has the same divergence."""
    return v - v.mean(dim=1, keepdim=True)


class ParticleFeatures(nn.Module):
    """Features of each particle to start from: its kind's, and those of the time.

    Args:
        particles: how many.
        features: of each.
        types: the kind of each particle, such as an atom's, counted from 0; None if all are alike.
        time_embedding: as for `MLP`.

    Shape:
        t `()` or `(k,)`, x `(k, particles, dimensions)`; returns `(k, particles, features)`.

    Raises:
        NetworkError: types that are no whole number for each particle.
    """

    types: Tensor

    def __init__(
        self, particles: int, features: int, types: Sequence[int] | None, time_embedding: nn.Module | None
    ) -> None:
        super().__init__()
        kinds = torch.as_tensor([0] * particles if types is None else list(types))
        if kinds.shape != (particles,) or kinds.is_floating_point() or kinds.min() < 0:
            raise NetworkError(
                f"types must be a whole number from 0 for each of {particles} particles, but is {types!r}"
            )
        self.register_buffer("types", kinds, persistent=False)
        self.kinds = nn.Embedding(int(kinds.max()) + 1, features)
        self.time = nn.Linear(time_features(time_embedding), features)
        self.time_embedding = time_embedding

    def forward(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch particles features"]:
        """The features at time t."""
        return self.kinds(self.types) + self.time(condition(t, x, None, 0, self.time_embedding))[:, None]

"""Shared parts of networks of particles: event shapes `(particles, dimensions)`, distances, and features of kinds and of time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import check_count, checked_event_shape
from divflow.networks.conditioning import NetworkError, condition, time_features

__all__ = [
    "ParticleFeatures",
    "RadialLinear",
    "centered",
    "check_particles",
    "distances",
    "off_diagonal",
    "particle_shape",
]

# Range of the Gaussians of distances: at unit variance, clusters of tens of particles are no wider.
_REACH = 6.0


def particle_shape(event_shape: int | Sequence[int], network: str) -> tuple[int, int]:
    """Number of particles and of spatial dimensions of an event shape.

    Raises:
        NetworkError: the event shape is not `(particles, dimensions)`, or has only one particle.
    """
    shape = checked_event_shape(event_shape)
    if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise NetworkError(
            f"{network} needs events (particles, dimensions) with at least two particles, but the event shape is {shape}"
        )
    return shape[0], shape[1]


def check_particles(x: Tensor, event_shape: tuple[int, int]) -> None:
    """Refuse another number of particles or of dimensions.

    Raises:
        NetworkError: naming both.
    """
    if x.shape[1:] != event_shape:
        raise NetworkError(
            f"the network was built for {event_shape[0]} particles in {event_shape[1]} dimensions, x of shape "
            f"(k, {event_shape[0]}, {event_shape[1]}), but x has shape {tuple(x.shape)}. Build a network for that number of particles"
        )


def distances(difference: Float[Tensor, "*pairs dimensions"]) -> tuple[Tensor, Tensor]:
    """Squared distances r^2 of differences, and u = sqrt(1 + r^2), which is smooth where particles meet, `(*pairs, 1)`."""
    squared = difference.square().sum(dim=-1, keepdim=True)
    return squared, (1 + squared).sqrt()


def off_diagonal(x: Tensor) -> Float[Tensor, "1 particles particles 1"]:
    """One for each pair of different particles, zero for a particle with itself."""
    return (1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device))[None, :, :, None]


def centered(v: Float[Tensor, "batch particles dimensions"]) -> Float[Tensor, "batch particles dimensions"]:
    """Subtract the mean over particles. This does not change the divergence of a field that is invariant to translations."""
    return v - v.mean(dim=1, keepdim=True)


class RadialLinear(nn.Module):
    """Linear layer over features of a distance u: u itself, and Gaussians of it (Schütt et al. 2017, arXiv:1706.08566).

        W [u, exp(-((u - mu_1) / w)^2 / 2), ...] + b,      mu_k from 1 to 7, w their spacing

    Without the Gaussians, forces that are sharp in the distance take several times as many training steps.

    Args:
        out: number of output features.
        gaussians: number of Gaussians, at least 0.
        bias: whether there is a bias b.
    """

    centers: Tensor

    def __init__(self, out: int, gaussians: int, bias: bool = True) -> None:
        super().__init__()
        check_count("gaussians", gaussians, least=0)
        self.linear = nn.Linear(1 + gaussians, out, bias)
        self.register_buffer("centers", 1 + torch.linspace(0, _REACH, gaussians), persistent=False)
        self.width = _REACH / max(1, gaussians - 1)

    def forward(self, u: Float[Tensor, "*pairs 1"]) -> Float[Tensor, "*pairs out"]:
        """Value of the layer."""
        return self.linear(torch.cat([u, self._bumps(u)], dim=-1))

    def with_slope(self, u: Float[Tensor, "*pairs 1"]) -> tuple[Tensor, Tensor]:
        """Value, and its derivative in u."""
        bumps = self._bumps(u)
        slopes = torch.cat([torch.ones_like(u), (self.centers - u) / self.width**2 * bumps], dim=-1)
        return self.linear(torch.cat([u, bumps], dim=-1)), nn.functional.linear(slopes, self.linear.weight)

    def _bumps(self, u: Tensor) -> Float[Tensor, "*pairs gaussians"]:
        return (-0.5 * ((u - self.centers) / self.width).square()).exp()


class ParticleFeatures(nn.Module):
    """Initial features of each particle: those of its kind plus those of the time.

    Args:
        particles: number of particles.
        features: number of features of each.
        types: kind of each particle, such as an atom's, counted from 0; None if all are alike.
        time_embedding: as for `MLP`.

    Shape:
        t `()` or `(k,)`, x `(k, particles, dimensions)`; returns `(k, particles, features)`.

    Raises:
        NetworkError: types are not a whole number for each particle.
    """

    types: Tensor

    def __init__(
        self, particles: int, features: int, types: Sequence[int] | None, time_embedding: nn.Module | None
    ) -> None:
        super().__init__()
        kinds = torch.as_tensor([0] * particles if types is None else list(types))
        if kinds.shape != (particles,) or kinds.is_floating_point() or kinds.min() < 0:
            raise NetworkError(
                f"types must hold a whole number of at least 0 for each of {particles} particles, but is {types!r}"
            )
        self.register_buffer("types", kinds, persistent=False)
        self.kinds = nn.Embedding(int(kinds.max()) + 1, features)
        self.time = nn.Linear(time_features(time_embedding), features)
        self.time_embedding = time_embedding

    def forward(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch particles features"]:
        """Features at time t."""
        return self.kinds(self.types) + self.time(condition(t, x, None, 0, self.time_embedding))[:, None]

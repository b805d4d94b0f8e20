"""The equivariant graph network, over particles that all see each other."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import check_count
from divflow.networks.particles import (
    ParticleFeatures,
    RadialLinear,
    centered,
    check_particles,
    distances,
    off_diagonal,
    particle_shape,
)
from divflow.networks.tangents import perceptron
from divflow.networks.time import SinusoidalEmbedding

__all__ = ["EGNN"]

# It has no state, so all networks may share it.
_WAVES = SinusoidalEmbedding(32)


class EGNN(nn.Module):
    """E(n)-equivariant graph network as a field (Satorras, Hoogeboom & Welling 2021, arXiv:2102.09844, equations 3 to 6).

        m_ij = mlp([h_i, h_j, u_ij]),    x_i <- x_i + mean_j (x_i - x_j) / u_ij mlp(m_ij),    h_i <- h_i + mlp([h_i, mean_j m_ij])

    with u_ij = sqrt(1 + |x_i - x_j|^2) and h_i = kind_i + W embedding(t) at the start. net(t, x) is the displacement of x by
    all layers. It is equivariant to rotations, reflections and permutations of particles of one kind, and invariant to translations.

    Divergence: every layer lets all particles see each other, so `Exact` takes D products. Use `Hutchinson` for all but a few
    particles, or `HollowEGNN` for an exact divergence at any number.

    Args:
        event_shape: `(particles, dimensions)`.
        hidden: width of features, messages and their networks.
        layers: number of rounds of messages.
        gaussians: number of Gaussian features of a distance beside itself, for positions of unit variance (`RadialLinear`).
        types: kind of each particle, such as an atom's, counted from 0; None if all are alike.
        mean_free: keep the centre of mass, for flows with base `MeanFreeNormal`.
        activation: class or function that makes an activation module; a smooth one (see `MLP`).
        zero_init: start with last layers of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: as for `MLP`, a sinusoidal one by default; None for time itself, one feature.

    Shape:
        t `()` or `(k,)`, x `(k, particles, dimensions)`; returns x's shape.

    Raises:
        ValueError: layers or hidden are not whole numbers of at least 1, or gaussians of at least 0.
        NetworkError: the event shape is not one of particles, or types are not a whole number for each; in a call, x has
            another number of particles.

    Example:
        >>> EGNN((5, 3), types=[0, 0, 1, 1, 2])(torch.tensor(0.5), torch.randn(2, 5, 3)).shape
        torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: int = 64,
        layers: int = 3,
        gaussians: int = 24,
        types: Sequence[int] | None = None,
        mean_free: bool = False,
        activation: Callable[[], nn.Module] = nn.SiLU,
        zero_init: bool = False,
        time_embedding: nn.Module | None = _WAVES,
    ) -> None:
        super().__init__()
        check_count("hidden", hidden)
        check_count("layers", layers)
        self.event_shape, self.mean_free = particle_shape(event_shape, "EGNN"), mean_free
        self.features = ParticleFeatures(self.event_shape[0], hidden, types, time_embedding)
        self.layers = nn.ModuleList(_Layer(hidden, gaussians, activation, zero_init) for _ in range(layers))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Displacement at (t, x); see the class for the shapes."""
        check_particles(x, self.event_shape)
        moved, features = x, self.features(t, x)
        for layer in self.layers:
            moved, features = layer(moved, features)
        return centered(moved - x) if self.mean_free else moved - x


class _Layer(nn.Module):
    """One round of messages, which update positions and features."""

    def __init__(self, hidden: int, gaussians: int, activation: Callable[[], nn.Module], zero_init: bool) -> None:
        super().__init__()
        self.receive, self.send = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.distance = RadialLinear(hidden, gaussians, bias=False)
        self.message = nn.Sequential(activation(), nn.Linear(hidden, hidden), activation())
        self.move = perceptron([hidden, hidden, 1], activation, zero_init)
        self.learn = perceptron([2 * hidden, hidden, hidden], activation)

    def forward(
        self, x: Float[Tensor, "batch particles dimensions"], h: Float[Tensor, "batch particles hidden"]
    ) -> tuple[Tensor, Tensor]:
        difference = x[:, :, None] - x[:, None]
        u = distances(difference)[1]
        messages = self.message(self.receive(h)[:, :, None] + self.send(h)[:, None] + self.distance(u))
        messages = messages * off_diagonal(x)
        others = x.shape[1] - 1
        x = x + (difference / u * self.move(messages)).sum(dim=2) / others
        return x, h + self.learn(torch.cat([h, messages.sum(dim=2) / others], dim=-1))

"""Forces between pairs of particles along the line that joins them, whose divergence is a sum over pairs."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError, condition, time_features
from divflow.networks.particles import RadialLinear, check_particles, distances, particle_shape
from divflow.networks.tangents import perceptron, push_forward

__all__ = ["PairField"]


class PairField(nn.Module):
    """Field of pair forces between particles, along the line that joins them, by their distance.

        net(t, x)_i = sum_j (x_i - x_j) phi(|x_i - x_j|, t),        phi = mlp([features(u), embedding(t)]) / u,   u = sqrt(1 + r^2)

    - Because of the division by u, forces grow no faster than the distance, so no trajectory ends in finite time.
    - The field is equivariant to rotations, reflections and permutations of the particles, invariant to translations, and keeps
      their centre of mass (Köhler, Klein & Noé 2020, arXiv:2006.02425). With the base `MeanFreeNormal` it makes a flow of
      particles without centre of mass.

    Divergence: its own closed form. Each ordered pair gives d phi + r phi'(r), at two to three times the cost of the value for any
    number of particles.

    Args:
        event_shape: `(particles, dimensions)`.
        hidden: width of each hidden layer of phi, at least one.
        gaussians: number of Gaussian features of a distance beside itself, for positions of unit variance (`RadialLinear`).
        activation: class or function that makes an activation module, an elementwise function; a smooth one (see `MLP`).
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: as for `MLP`.

    Shape:
        t `()` or `(k,)`, x `(k, particles, dimensions)`; returns x's shape.

    Raises:
        ValueError: gaussians is not a whole number of at least 0.
        NetworkError: the event shape is not one of particles, or hidden is empty; in a call, x has another number of particles.

    Example:
        >>> PairField((5, 3))(torch.tensor(0.5), torch.randn(2, 5, 3)).shape
        torch.Size([2, 5, 3])
    """

    first: Tensor
    second: Tensor
    incidence: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (64, 64),
        gaussians: int = 24,
        activation: Callable[[], nn.Module] = nn.SiLU,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.time_embedding = particle_shape(event_shape, "PairField"), time_embedding
        if not hidden:
            raise NetworkError("PairField needs at least one hidden layer, but hidden is empty")
        self.distance = RadialLinear(hidden[0], gaussians)
        self.time = nn.Linear(time_features(time_embedding), hidden[0], bias=False)
        self.layers = nn.Sequential(activation(), *perceptron([*hidden, 1], activation, zero_init))
        first, second = torch.triu_indices(self.event_shape[0], self.event_shape[0], offset=1)
        eye = torch.eye(self.event_shape[0])
        # Sums over pairs are products with it, which are the same at every run, where scattered sums are not on GPUs.
        incidence = (eye[first] - eye[second]).T.contiguous()
        for name, values in (("first", first), ("second", second), ("incidence", incidence)):
            self.register_buffer(name, values, persistent=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Value of the field at (t, x); see the class for the shapes."""
        difference, _, u = self._pairs(x)
        return self.incidence @ (difference / u * self.layers(self.distance(u) + self._of_time(t, x)))

    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value `(k, particles, dimensions)` and divergence `(k,)`, twice the sum over pairs of d phi + r phi'(r)."""
        difference, squared, u = self._pairs(x)
        of_distance, its_slope = self.distance.with_slope(u)
        force, slope = push_forward(self.layers, of_distance + self._of_time(t, x), its_slope)
        # r phi'(r) of phi = force / u, with du/dr = r / u
        terms = (self.event_shape[1] * force + squared / u * (slope - force / u)) / u
        return self.incidence @ (difference / u * force), 2 * terms.sum(dim=(1, 2))

    def _pairs(self, x: Tensor) -> tuple[Float[Tensor, "batch pairs dimensions"], Tensor, Tensor]:
        check_particles(x, self.event_shape)
        difference = x[:, self.first] - x[:, self.second]
        return difference, *distances(difference)

    def _of_time(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch one hidden"]:
        """First layer, applied to time."""
        return self.time(condition(t, x, None, 0, self.time_embedding))[:, None]

"""Energies of particles that are sums over pairs: the double well of four particles in the plane, the Lennard-Jones cluster."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.errors import DivflowError, check_count, check_numbers, check_positive

__all__ = ["DoubleWell", "EnergyError", "LennardJones", "PairEnergy", "check_energy"]


class EnergyError(DivflowError, ValueError):
    """An energy got arguments that it does not take, or its density can't be sampled or normalized."""


@dataclass(frozen=True)
class PairEnergy(ABC):
    """Energy of particles that is a sum over unordered pairs, in units of kT.

        U(x) = sum_{i < j} u(|x_i - x_j|)

    A subclass implements u as `pair`. The Boltzmann density exp(-U(x)) / Z is one of particles whose centre of mass is zero: on the
    subspace of (n - 1) d dimensions, with respect to its Euclidean volume, as for `MeanFreeNormal`. U is invariant to translations,
    rotations, reflections and permutations.

    Args:
        particles: n, at least 2.
        dimensions: d, of space.

    Shape:
        called with x `(k, n, d)`; returns U `(k,)`, at least twice differentiable.

    Raises:
        ValueError: an option is not a number of its kind.
        EnergyError: in a call, x has another number of particles or dimensions or no floating dtype, or `pair` does not return one
            real energy for each squared distance.
    """

    particles: int
    dimensions: int

    def __post_init__(self) -> None:
        check_count("particles", self.particles, least=2)
        check_count("dimensions", self.dimensions)

    @abstractmethod
    def pair(self, squared: Tensor) -> Tensor:
        """The function u of the squared distance, elementwise, in kT."""

    @property
    def event_shape(self) -> tuple[int, int]:
        """`(particles, dimensions)`."""
        return self.particles, self.dimensions

    def __call__(self, x: Float[Tensor, "batch particles dimensions"]) -> Float[Tensor, " batch"]:
        """Energy of each sample, in kT."""
        squared = self._squared(x)
        u = self.pair(squared)
        if not isinstance(u, Tensor) or u.shape != squared.shape or u.is_complex():
            what = f"shape {tuple(u.shape)} of {u.dtype}" if isinstance(u, Tensor) else repr(u)
            raise EnergyError(
                f"pair of {type(self).__name__} must return a real energy for each squared distance, {tuple(squared.shape)}, but returned {what}. "
                "Compute it elementwise"
            )
        return u.sum(dim=1)

    def distances(self, x: Float[Tensor, "batch particles dimensions"]) -> Float[Tensor, "batch pairs"]:
        """Distances of all pairs i < j, in the order of `torch.triu_indices`."""
        return _root(self._squared(x))

    def _squared(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.event_shape:
            raise EnergyError(
                f"the energy takes {self.particles} particles in {self.dimensions} dimensions, x of shape (k, {self.particles}, "
                f"{self.dimensions}), but x has shape {tuple(x.shape)}. Build one for other particles by "
                f"{type(self).__name__}(particles=..., dimensions=...)"
            )
        if not x.is_floating_point():
            raise EnergyError(f"x must have a floating dtype, but has {x.dtype}. Use x.float()")
        first, second = torch.triu_indices(self.particles, self.particles, offset=1, device=x.device)
        eye = torch.eye(self.particles, dtype=x.dtype, device=x.device)
        # As one product with a matrix: indexing's backward pass adds row after row.
        return (x.mT @ (eye[first] - eye[second]).T).square().sum(dim=1)


@dataclass(frozen=True)
class DoubleWell(PairEnergy):
    """DW4, a double well in each distance of 4 particles in the plane (Köhler, Klein & Noé 2020, arXiv:2006.02425, section 8).

        U(x) = 1 / tau sum_{i < j} a (r_ij - d_0) + b (r_ij - d_0)^2 + c (r_ij - d_0)^4

    The defaults a = 0, b = -4, c = 0.9, d_0 = 4 and tau = 1 are those of the literature (Satorras et al. 2021, arXiv:2105.09016; Klein,
    Krämer & Noé 2023, arXiv:2306.15030), which writes half of the sum over ordered pairs. A pair is at rest at d_0 -+ sqrt(-b / 2c),
    2.51 and 5.49, with a barrier of 4.4 kT.

    Args:
        particles: n.
        dimensions: d, of space.
        a: coefficient of the distance from d_0, in kT.
        b: coefficient of its square.
        c: coefficient of its fourth power.
        d0: d_0, the distance between the wells.
        tau: temperature, which divides the whole energy.
    """

    particles: int = 4
    dimensions: int = 2
    a: float = 0.0
    b: float = -4.0
    c: float = 0.9
    d0: float = 4.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(a=self.a, b=self.b)
        for name in ("c", "d0", "tau"):
            check_positive(name, getattr(self, name))

    def pair(self, squared: Tensor) -> Tensor:
        """The function u of the squared distance, elementwise, in kT."""
        r = _root(squared) - self.d0
        return (self.a * r + self.b * r.square() + self.c * r.square().square()) / self.tau

    def extended(self, x: Float[Tensor, "batch particles dimensions"]) -> Float[Tensor, " batch"]:
        """Share of the pairs in the outer well, r > d_0."""
        return (self.distances(x) > self.d0).to(x.dtype).mean(dim=1)

    def free_energy_difference(self, extended: Tensor) -> Tensor:
        """F(outer) - F(inner) = -log(p / (1 - p)) in kT, with p the probability of the outer well, the mean of `extended`."""
        return -torch.logit(extended)


@dataclass(frozen=True)
class LennardJones(PairEnergy):
    """LJ13, a cluster of 13 Lennard-Jones particles, held by springs to its centre (Köhler, Klein & Noé 2020, section 8).

        U(x) = epsilon sum_{i < j} ((r_m / r_ij)^12 - 2 (r_m / r_ij)^6) + c / 2 sum_i |x_i - mean x|^2

    The springs are a sum over pairs, too, c / (2 n) sum_{i < j} r_ij^2.

    The training samples of the literature (Klein, Krämer & Noé 2023) have epsilon = 2. Its formula halves a sum over ordered pairs and
    has epsilon = 1, but the code that made the samples does not halve. The standard deviation of a coordinate is 0.681 at
    epsilon = 2, as in those samples, and 0.88 at 1.

    Args:
        particles: n.
        dimensions: d, of space.
        epsilon: depth of a pair's well, in kT.
        r_m: distance of a pair at the bottom of its well.
        oscillator: c of the springs, in kT. It must be positive: without springs particles escape, and there is no density.
    """

    particles: int = 13
    dimensions: int = 3
    epsilon: float = 2.0
    r_m: float = 1.0
    oscillator: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "r_m", "oscillator"):
            check_positive(name, getattr(self, name))

    def pair(self, squared: Tensor) -> Tensor:
        """The function u of the squared distance, elementwise, in kT; infinite at a distance of zero."""
        ratio = self.r_m**2 / squared
        sixth = ratio * ratio * ratio
        return self.epsilon * sixth * (sixth - 2) + self.oscillator / (2 * self.particles) * squared


def check_energy(energy: PairEnergy) -> None:
    """Refuse what is not a `PairEnergy`, such as a function.

    Raises:
        EnergyError: naming the value.
    """
    if not isinstance(energy, PairEnergy):
        raise EnergyError(
            f"energy must be a PairEnergy, but is {energy!r}. Derive a class from it whose method `pair` gives u of the squared distance"
        )


def _root(squared: Tensor) -> Tensor:
    """Square root with derivative zero at zero, where that of particles that meet would be infinite."""
    least = math.sqrt(torch.finfo(squared.dtype).tiny)
    return squared.clamp_min(least).sqrt()

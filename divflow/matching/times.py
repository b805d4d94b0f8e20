"""The times at which a velocity is fitted, drawn from a density on [0, 1]."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.distributions.noise import uniform_times_like
from divflow.errors import DivflowError, check_numbers, check_positive

__all__ = [
    "LogarithmicTimes",
    "LogitNormalTimes",
    "MatchingError",
    "PowerTimes",
    "Times",
    "UniformTimes",
    "check_times",
]


class MatchingError(DivflowError, ValueError):
    """A time, noise or datum for which flow matching is not defined."""


@dataclass(frozen=True, kw_only=True)
class Times(ABC):
    """Base class of the densities of times on [0, 1], given by their quantile functions.

    Every density that is positive on (0, 1) has the same best velocity; errors weigh more where it is large.

    Args:
        stratified: draw the k times of a batch from k equal parts of the density, one each, in random order. Each time
            still follows the density, but the mean of a batch varies far less.
    """

    stratified: bool = True

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the times below which a fraction u in [0, 1] lies, of u's shape."""

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw a time for each row of x, `(k,)`, in x's dtype and on its device; torch's default generator if None."""
        return self.quantile(uniform_times_like(x, generator, stratified=self.stratified)).to(x.dtype)


@dataclass(frozen=True)
class UniformTimes(Times):
    """Draw all times alike: the objective of Lipman et al. (2023, arXiv:2210.02747, equation 9).

    Args:
        stratified: as of `Times`.
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Return u itself."""
        return u


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """Draw times whose logit is normal, mostly in the middle, where velocities are hardest to learn.

        log(t / (1 - t)) ~ N(mean, std^2)

    (Esser et al. 2024, arXiv:2403.03206, section 3.1). The density vanishes at both ends: what a likelihood needs there,
    above all fine detail near the data, is learnt late.

    Args:
        stratified: as of `Times`.
        mean: of the logit; positive for times closer to the data. (That paper has the data at t = 0, so the opposite sign.)
        std: of the logit.

    Raises:
        ValueError: a mean that is not a number, or a standard deviation that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(mean=self.mean)
        check_positive("std", self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """Return the logistic function of the normal quantile."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class PowerTimes(Times):
    """Draw times mostly near the data, where fine detail is made (Dax et al. 2023, arXiv:2305.17161, section 3.3).

        p(t) = (power + 1) t^power

    It suits sharp likelihoods and posteriors: there an error of the velocity is a larger error of the score.

    Args:
        stratified: as of `Times`.
        power: 0 is uniform; below, down to -1, times are mostly near the noise.

    Raises:
        ValueError: a power that is not a number above -1.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(power=self.power)
        if not -1 < self.power < math.inf:
            raise ValueError(f"power must be above -1 and finite, so that times have a density, but is {self.power!r}")

    def quantile(self, u: Tensor) -> Tensor:
        """Return the root of u."""
        return u ** (1 / (self.power + 1))


@dataclass(frozen=True)
class LogarithmicTimes(Times):
    """Draw times of all distances from the data alike, on a logarithmic scale: for densities with detail of many scales.

        p(t) = 1 / ((1 - t + epsilon) log(1 + 1 / epsilon))

    A velocity at distance 1 - t from the data blurs detail that is finer than a multiple of it, so each scale gets its share of the
    times. `LogarithmicEmbedding` lets a network see them as far apart.

    Args:
        stratified: as of `Times`.
        epsilon: distance from the data below which times are uniform.

    Raises:
        ValueError: epsilon is not positive.
    """

    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)

    def quantile(self, u: Tensor) -> Tensor:
        """Return 1 - epsilon ((1 + 1 / epsilon)^(1 - u) - 1)."""
        return (1 - self.epsilon * torch.expm1((1 - u) * math.log1p(1 / self.epsilon))).clamp(0, 1)


def check_times(t: Tensor) -> None:
    """Refuse times outside [0, 1].

    Args:
        t: the times.

    Raises:
        MatchingError: with the least and the greatest.
    """
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        raise MatchingError(
            f"t must lie in [0, 1], with noise at 0 and data at 1, but reaches from {t.min().item():g} to {t.max().item():g}"
        )

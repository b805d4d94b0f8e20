"""The times at which a velocity is fitted, drawn from a density on [0, 1]."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.distributions.noise import uniform_times_like
from divflow.errors import DivflowError, check_numbers, check_positive

__all__ = ["LogitNormalTimes", "MatchingError", "PowerTimes", "Times", "UniformTimes", "check_times"]


class MatchingError(DivflowError, ValueError):
    """A time, noise or datum that flow matching is not defined for."""


@dataclass(frozen=True, kw_only=True)
class Times(ABC):
    """A density of times on [0, 1], by its quantile function.

    Every density that is positive on (0, 1) has the same best velocity; where it is large, errors weigh more.

    Args:
        stratified: draw the k times of a batch from k equal parts of the density, one each, in random order: every one is
            distributed as the density says, but the mean of a batch varies far less.
    """

    stratified: bool = True

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The times below which a share of u in [0, 1] lies, of u's shape."""

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """A time for each row of x, `(k,)`, in x's dtype and on its device; torch's default generator if None."""
        return self.quantile(uniform_times_like(x, generator, stratified=self.stratified)).to(x.dtype)


@dataclass(frozen=True)
class UniformTimes(Times):
    """All times alike: the objective of Lipman et al. (2023, arXiv:2210.02747, equation 9)."""

    def quantile(self, u: Tensor) -> Tensor:
        """The share itself."""
        return u


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """Times whose logit is normal, mostly in the middle, where velocities are hardest (Esser et al. 2024, arXiv:2403.03206, section 3.1).

        log(t / (1 - t)) ~ N(mean, std^2)

    Their density vanishes at both ends: what a likelihood needs there, of fine detail near the data most of all, is
    learnt late.

    Args:
        mean: of the logit; positive for times nearer to the data. (In that paper data are at t = 0: the sign is the other one.)
        std: of the logit.

    Raises:
        ValueError: a mean that is no number, or a standard deviation that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(mean=self.mean)
        check_positive("std", self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """The logistic function of the normal quantile."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class PowerTimes(Times):
    """Times mostly near the data, where fine detail is made (Dax et al. 2023, arXiv:2305.17161, section 3.3).

        p(t) = (power + 1) t^power

    For likelihoods and posteriors that are sharp: the error of a velocity there is the larger one of a score.

    Args:
        power: 0 is uniform; below, down to -1, times are mostly near the noise.

    Raises:
        ValueError: a power that is no number above -1.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(power=self.power)
        if not -1 < self.power < math.inf:
            raise ValueError(f"power must be above -1 and finite, so that times have a density, but is {self.power!r}")

    def quantile(self, u: Tensor) -> Tensor:
        """The root of u."""
        return u ** (1 / (self.power + 1))


def check_times(t: Tensor) -> None:
    """Refuse times outside [0, 1].

    Raises:
        MatchingError: with the least and the greatest.
    """
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        raise MatchingError(
            f"t must lie in [0, 1], noise at 0 and data at 1, but reaches from {t.min().item():g} to {t.max().item():g}"
        )

"""Sliced score matching: the objective along random directions, exactly or by finite differences."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.divergence import Field, FieldError, Hutchinson
from divflow.errors import check_count, check_positive
from divflow.operators.field import accumulation_dtype, flatten_event
from divflow.score.field import evaluate
from divflow.score.objectives.objective import Objective, half_squared_norm, in_lengths

__all__ = ["FiniteDifferenceScoreMatching", "SlicedScoreMatching"]


@dataclass(frozen=True)
class SlicedScoreMatching(Objective):
    """Train a score along random directions, the slices v (Song et al. 2019, equation 8).

        mean over v of v^T J v + (v^T s)^2 / 2,    J the Jacobian of s

    With variance reduction it is v^T J v + |s|^2 / 2 (equation 9): since E[v v^T] = I the expectation is the same, without
    the variance of the sliced norm. That is `ImplicitScoreMatching(Hutchinson(num_slices, distribution))`, number for
    number.

    Args:
        num_slices: directions per sample, each a vector-Jacobian product; at least 1.
        distribution: "rademacher", "gaussian" or "sphere" (of norm sqrt(D)); the first varies least.
        variance_reduction: take the norm itself, not its slice.

    Raises:
        ValueError: fewer than one slice, or an unknown distribution.
    """

    num_slices: int = 1
    distribution: str = "rademacher"
    variance_reduction: bool = False

    def __post_init__(self) -> None:
        check_count("num_slices", self.num_slices)
        Hutchinson(self.num_slices, self.distribution)  # which checks the distribution

    def loss(
        self,
        score: Field,
        t: Tensor,
        x: Tensor,
        generator: Generator | None = None,
        conditional_score: Tensor | None = None,
    ) -> Tensor:
        """Compute the losses, as `Objective.loss`; differentiating them once takes the second derivatives of s."""
        slices = Hutchinson(self.num_slices, self.distribution).freeze(x, generator)
        value, divergence = slices(score, t, x)
        value = in_lengths(score, value)
        norm = half_squared_norm(value) if self.variance_reduction else _sliced_norm(value, slices.probes)
        return divergence + norm


@dataclass(frozen=True)
class FiniteDifferenceScoreMatching(Objective):
    """Train a score along random directions by finite differences, without derivatives of s (Pang et al. 2020).

        mean over slices v of v^T (s+ - s-) / (2 step) + (v^T (s+ + s-) / 2)^2 / 2,    s+- = s(t, x +- step v)

    or |(s+ + s-) / 2|^2 / 2 as the second term, with variance reduction. It converges to `SlicedScoreMatching` of the same
    slices as step^2 and costs two evaluations per slice. Training takes one derivative less than the sliced objective:
    first derivatives of s, and second ones if s is itself the gradient of an energy.

    Args:
        num_slices: directions per sample, at least 1.
        distribution: "rademacher", "gaussian" or "sphere" (of norm sqrt(D)).
        variance_reduction: take the norm itself, not its slice.
        step: distance in each entry of x, in x's units; below the length over which s bends. In float32 rounding adds an
            error of about 1e-7 |s| / step; half precisions are refused, and autocast is turned off.

    Raises:
        ValueError: fewer than one slice, an unknown distribution, or a step that is not positive.
    """

    num_slices: int = 1
    distribution: str = "rademacher"
    variance_reduction: bool = False
    step: float = 0.01

    def __post_init__(self) -> None:
        check_count("num_slices", self.num_slices)
        check_positive("step", self.step)
        Hutchinson(self.num_slices, self.distribution)  # which knows the distributions

    def loss(
        self,
        score: Field,
        t: Tensor,
        x: Tensor,
        generator: Generator | None = None,
        conditional_score: Tensor | None = None,
    ) -> Tensor:
        """Compute the losses, as `Objective.loss`.

        Raises:
            FieldError: x has a half precision, in which the differences would be noise.
        """
        if torch.finfo(x.dtype).bits < 32:
            raise FieldError(f"finite differences of {x.dtype} values are noise. Use float32, or SlicedScoreMatching.")
        probes = Hutchinson(self.num_slices, self.distribution).freeze(x, generator).probes
        total = x.new_zeros(len(x), dtype=accumulation_dtype(x))
        for probe in probes:
            with torch.autocast(x.device.type, enabled=False):
                forward, backward = (evaluate(score, t, x + step * probe) for step in (self.step, -self.step))
            mean, slope = in_lengths(score, forward + backward) / 2, (forward - backward) / (2 * self.step)
            norm = half_squared_norm(mean) if self.variance_reduction else _sliced_norm(mean, probe[None])
            total = total + _inner(probe, slope) + norm
        return total / self.num_slices


def _sliced_norm(value: Tensor, probes: Tensor) -> Tensor:
    """The mean over probes `(m, k, *event)` of (v^T s)^2 / 2, `(k,)`."""
    squares = (_inner(probe, value).square() for probe in probes)
    return sum(squares, value.new_zeros(())) / (2 * len(probes))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return flatten_event(a * b).sum(dim=1, dtype=accumulation_dtype(a))

"""The protocol that every way to a divergence follows, exact or estimated."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.divergence.field import Field

__all__ = ["Estimate", "Estimator", "ValueAndDivergence", "accumulation_dtype"]


class ValueAndDivergence(NamedTuple):
    """g(t, x) of shape `(k, *event)` and its divergence of shape `(k,)`."""

    value: Tensor
    divergence: Tensor


class Estimate(NamedTuple):
    """A value and divergence with what is known of the divergence's error.

    Attributes:
        value: g(t, x), `(k, *event)`.
        divergence: `(k,)`.
        standard_error: of the estimate over its probes, `(k,)`: zero where the divergence is exact, None where a single
            probe can't tell.
        samples: `(m, k)`, the m independent estimates whose mean the divergence is; None if it is no such mean.
        products: v^T J for the m probes v, `(m, k, *event)`, where these have E[v v^T] = I; None if there are none.
    """

    value: Tensor
    divergence: Tensor
    standard_error: Tensor | None
    samples: Tensor | None = None
    products: Tensor | None = None


class Estimator(ABC):
    """A way to the divergence: a callable of field, time and state.

    Write your own by implementing `estimate`; everything in divflow then accepts it. A stochastic one
    draws from `generator` (torch's default one if None), keeps no state between calls, and implements
    `freeze`.
    """

    stochastic: bool = False
    """Whether two calls may differ."""

    frozen: bool = False
    """Whether it is bound, by `freeze`, to batches of one shape."""

    @abstractmethod
    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the divergence and its standard error, from one evaluation of the field."""

    def __call__(
        self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None
    ) -> ValueAndDivergence:
        """The value `(k, *event)` and the divergence `(k,)`, from one evaluation of the field."""
        estimate = self.estimate(g, t, x, generator)
        return ValueAndDivergence(estimate.value, estimate.divergence)

    def prefers_one_time(self, g: Field, t: Tensor, x: Tensor) -> bool:
        """Whether many times are better evaluated one after another, t being a scalar, than as one batch.

        Args:
            g: a field that takes both.
            t: one of the times, `()`.
            x: states at that time.
        """
        return False

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "Estimator":
        """An estimator that is a deterministic function of (t, x) for batches of x's shape."""
        return self

    def along(self, x: Tensor, bundles: Sequence[int], generator: Generator | None = None) -> "Sequence[Estimator]":
        """An estimator for each bundle of the times at which the divergences of one batch are to be summed.

        The mean of estimates that are unbiased, but not independent of those of other times, may vary less.

        Args:
            x: states `(k, *event)` at one time.
            bundles: how many times each of them takes, as a batch of states `(times * k, *event)`.
            generator: of what is drawn beforehand.
        """
        return [self] * len(bundles)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype a divergence is summed and returned in: x's, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)

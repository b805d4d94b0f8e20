"""The protocol that every way to a divergence follows, exact or estimated."""

from abc import ABC, abstractmethod
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

    `standard_error` `(k,)` is that of the estimate over its probes: zero where the divergence is exact,
    None where a single probe can't tell.
    """

    value: Tensor
    divergence: Tensor
    standard_error: Tensor | None


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
        value, divergence, _ = self.estimate(g, t, x, generator)
        return ValueAndDivergence(value, divergence)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "Estimator":
        """An estimator that is a deterministic function of (t, x) for batches of x's shape."""
        return self


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype a divergence is summed and returned in: x's, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)

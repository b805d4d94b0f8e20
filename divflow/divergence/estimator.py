"""The protocol that every way to a divergence follows, exact or estimated."""

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from divflow.divergence.compiled import eagerly
from divflow.divergence.field import Field, linearize_field
from divflow.divergence.transformed import transformable

__all__ = ["Estimate", "Estimator", "FrozenProbes", "Products", "ValueAndDivergence", "accumulation_dtype"]


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

    @property
    def estimates(self) -> bool:
        """Whether the divergence is known up to an error of random vectors: drawn at each call, or once by `freeze`."""
        return self.stochastic or self.frozen

    @abstractmethod
    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the divergence and its standard error, from one evaluation of the field."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("estimate", "freeze"):
            if isinstance(method := vars(cls).get(name), types.FunctionType):
                setattr(cls, name, eagerly(transformable(method)))

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

    def prepare(self, g: Field, x: Tensor, trajectories: Callable[[Tensor], tuple[Tensor, Tensor]]) -> "Estimator":
        """The estimator with what it learns beforehand of a field along a flow's trajectories: itself, for most.

        Args:
            g: the field.
            x: states such as it will be asked for, `(k, *event)`.
            trajectories: of samples of the flow's data `(r, *event)`: times `(n,)`, increasing, and the states there,
                `(n, r, *event)`.
        """
        return self


class Products(Protocol):
    """A field at a point: its value, and vector-Jacobian products there (`Linearization`)."""

    value: Tensor

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """v^T J for every vector v, `(products, k, *event)`; without a graph if it is to be `constant`."""


class FrozenProbes(Estimator):
    """An estimator whose random vectors are drawn: it needs a field's value and products alone."""

    frozen = True

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the estimate, and its standard error; `generator` is not used."""
        self.check(x)
        return self.from_products(linearize_field(g, t, x), x)

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Refuse an x of another shape than the vectors were drawn for."""

    @abstractmethod
    def from_products(self, field: Products, x: Tensor) -> Estimate:
        """The estimate of the trace of that Jacobian at x."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype a divergence is summed and returned in: x's, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)

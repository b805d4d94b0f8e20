"""The protocol that every way to a divergence follows, exact or estimated."""

import functools
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from divflow.errors import FieldError
from divflow.operators.compiled import eagerly
from divflow.operators.field import Field
from divflow.operators.linearization import linearize_field
from divflow.operators.transformed import transformable, transformed

__all__ = ["Estimate", "Estimator", "FrozenProbes", "Products", "ValueAndDivergence"]


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
    `freeze`. At its first call one that says it is not random is asked twice about a field of our own.

    Raises:
        FieldError: by a call, a result of another shape than `Estimate` says, or an estimator that is random and says it is not.
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
                setattr(cls, name, eagerly(transformable(_checked(method) if name == "estimate" else method)))

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


Method = Callable[..., Estimate]

# Samples of that field: in two dimensions half of all probes have the same product with it.
_ROWS = 16
# Classes that say that they are not random, and were found not to be.
_DETERMINISTIC: weakref.WeakSet[type] = weakref.WeakSet()


def _checked(estimate: Method) -> Method:
    """An estimator's `estimate`, whose results have the shapes that all else relies on, and which is as random as it says."""

    @functools.wraps(estimate)
    def call(self: Estimator, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        if not (self.estimates or type(self) in _DETERMINISTIC or type(self).__module__.startswith("divflow.")):
            _check_deterministic(self, estimate, x)
        found = estimate(self, g, t, x, generator)
        _check_shapes(self, found, x)
        return found

    return call


def _check_shapes(estimator: Estimator, found: Estimate, x: Tensor) -> None:
    name, rows = type(estimator).__name__, tuple(x.shape[:1])
    if not isinstance(found, Estimate):
        raise FieldError(
            f"{name}.estimate must return an Estimate(value, divergence, standard_error), but returned a {type(found).__name__}"
        )
    shapes = {
        "value": tuple(x.shape),
        "divergence": rows,
        "standard_error": rows,
        "samples": rows,
        "products": tuple(x.shape),
    }
    for part, shape in shapes.items():
        given = getattr(found, part)
        leading = 1 if part in ("samples", "products") else 0  # of several
        if given is None and part not in ("value", "divergence"):
            continue
        if not isinstance(given, Tensor) or tuple(given.shape[leading:]) != shape or given.ndim != leading + len(shape):
            what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            expected = f"(m, {', '.join(map(str, shape))})" if leading else str(shape)
            raise FieldError(
                f"{name}.estimate returned a {part} of {what} for x of shape {tuple(x.shape)}; it must be of shape {expected}"
            )


def _check_deterministic(estimator: Estimator, estimate: Method, x: Tensor) -> None:
    """Refuse an estimator that says it is not random, and of whose two estimates of one trace the second is another.

    It is asked about a field whose Jacobian is no diagonal matrix, for which products with random vectors differ.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.numel() == 0 or transformed():
        return
    zeros = x.detach().new_zeros(_ROWS, *x.shape[1:])
    try:
        with torch.inference_mode(False):
            first, second = (estimate(estimator, _shear, 0.0, zeros.clone()).divergence for _ in range(2))
        # Up to sums in another order, as some devices take them.
        same = torch.allclose(first, second, rtol=torch.finfo(first.dtype).eps ** 0.5)
    except Exception:  # it is for fields of another kind, or what it returns is no estimate
        same = True
    if same:
        _DETERMINISTIC.add(type(estimator))
    else:
        name, row = type(estimator).__name__, int((first - second).abs().argmax())
        raise FieldError(
            f"{name} estimated two divergences of one field, {first[row].item():.6g} and then {second[row].item():.6g}, but says that it is not "
            f"random; set stochastic = True in {name}, and write its freeze(x, generator), which draws the random vectors once"
        )


def _shear(t: Tensor, x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat + 2 * flat.roll(1, dims=1)).view_as(x)


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

"""The protocol of all ways to a divergence, exact or estimated."""

import functools
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from divflow.divergence.around import around
from divflow.errors import FieldError
from divflow.operators.compiled import eagerly
from divflow.operators.field import Field
from divflow.operators.linearization import linearize_field
from divflow.operators.transformed import transformable, transformed

__all__ = ["Estimate", "Estimator", "FrozenProbes", "Products", "ValueAndDivergence"]


class ValueAndDivergence(NamedTuple):
    """A field's value and divergence.

    Attributes:
        value: g(t, x), `(k, *event)`.
        divergence: (div g)(t, x), `(k,)`.
    """

    value: Tensor
    divergence: Tensor


class Estimate(NamedTuple):
    """A value and divergence, with what is known of the divergence's error.

    Attributes:
        value: g(t, x), `(k, *event)`.
        divergence: `(k,)`.
        standard_error: of the estimate over its probes, `(k,)`; zero if the divergence is exact, None if it is unknown, as
            with a single probe.
        samples: `(m, k)`, the m independent estimates whose mean the divergence is; None if it is no such mean.
        products: v^T J for the m probes v, `(m, k, *event)`, if these have E[v v^T] = I; None if there are none.
    """

    value: Tensor
    divergence: Tensor
    standard_error: Tensor | None
    samples: Tensor | None = None
    products: Tensor | None = None


class Estimator(ABC):
    """Base class of the ways to a divergence: a callable of field, time and state.

    Write your own by implementing `estimate`; everything in divflow then accepts it. A stochastic estimator

    - sets `stochastic = True`,
    - draws from `generator` (torch's default one if None),
    - keeps no state between calls,
    - implements `freeze`.

    One that declares itself deterministic is tested at its first call: it is evaluated twice on a field of divflow's.

    Raises:
        FieldError: at a call, if the result has another shape than `Estimate` documents, or if an estimator is random
            without declaring it.
    """

    stochastic: bool = False
    """Whether two calls may differ."""

    frozen: bool = False
    """Whether `freeze` bound it to batches of one shape."""

    @property
    def estimates(self) -> bool:
        """Whether the divergence has an error from random vectors, drawn at each call or once by `freeze`."""
        return self.stochastic or self.frozen

    @abstractmethod
    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Return the value, the divergence and its standard error, from one evaluation of the field.

        Args:
            g: the field, `g(t, x)`.
            t: time, a scalar or `(k,)`.
            x: states `(k, *event)`.
            generator: draws the probes of a stochastic estimator; torch's default one if None.
        """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("estimate", "freeze"):
            if isinstance(method := vars(cls).get(name), types.FunctionType):
                setattr(cls, name, eagerly(transformable(_checked(method) if name == "estimate" else method)))

    def __call__(
        self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None
    ) -> ValueAndDivergence:
        """Return the value `(k, *event)` and the divergence `(k,)`, from one evaluation of the field."""
        estimate = self.estimate(g, t, x, generator)
        return ValueAndDivergence(estimate.value, estimate.divergence)

    def prefers_one_time(self, g: Field, t: Tensor, x: Tensor) -> bool:
        """Whether many times are cheaper one after another, with scalar t, than as one batch.

        Args:
            g: a field that takes both.
            t: one of the times, `()`.
            x: states at that time.
        """
        return False

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "Estimator":
        """Draw the random vectors once: the result is a deterministic function of (t, x) for batches of x's shape.

        Args:
            x: states `(k, *event)` of that shape.
            generator: draws the vectors; torch's default one if None.
        """
        return self

    def along(self, x: Tensor, bundles: Sequence[int], generator: Generator | None = None) -> "Sequence[Estimator]":
        """Return an estimator for each bundle of the times at which the divergences of one batch are to be summed.

        The mean of estimates that are unbiased, but not independent of those at other times, may have a lower variance.

        Args:
            x: states `(k, *event)` at one time.
            bundles: how many times each of them takes, as a batch of states `(times * k, *event)`.
            generator: of what is drawn beforehand.
        """
        return [self] * len(bundles)

    def prepare(self, g: Field, x: Tensor, trajectories: Callable[[Tensor], tuple[Tensor, Tensor]]) -> "Estimator":
        """Learn beforehand about a field along a flow's trajectories; most estimators return themselves.

        Args:
            g: the field.
            x: states like those of later calls, `(k, *event)`.
            trajectories: takes samples of the flow's data `(r, *event)`; returns increasing times `(n,)` and the states
                there, `(n, r, *event)`.
        """
        return self


Method = Callable[..., Estimate]

# Samples of the test field: in two dimensions half of all probes have the same product with it.
_ROWS = 16
# Classes that declare themselves deterministic and passed the test.
_DETERMINISTIC: weakref.WeakSet[type] = weakref.WeakSet()


def _checked(estimate: Method) -> Method:
    """Wrap an estimator's `estimate`: the result has the documented shapes, and is random only if that is declared.

    A field on a manifold reaches it in coordinates in which its divergence is the ordinary one.
    """

    @functools.wraps(estimate)
    def call(self: Estimator, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        if not (self.estimates or type(self) in _DETERMINISTIC or type(self).__module__.startswith("divflow.")):
            _check_deterministic(self, estimate, x)
        near = around(g, x, self.estimates)
        if near is None:
            found = estimate(self, g, t, x, generator)
            _check_shapes(self, found, x)
            return found
        field, coordinates = near
        found = estimate(self, field, t, coordinates.origin, generator)
        _check_shapes(self, found, coordinates.origin)
        if coordinates.ambient is None:
            return found
        return found._replace(value=coordinates.ambient(found.value), products=None)

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
            what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"type {type(given).__name__}"
            expected = f"(m, {', '.join(map(str, shape))})" if leading else str(shape)
            raise FieldError(
                f"{name}.estimate returned {part} of {what} for x of shape {tuple(x.shape)}; the shape must be {expected}"
            )


def _check_deterministic(estimator: Estimator, estimate: Method, x: Tensor) -> None:
    """Refuse an estimator that declares itself deterministic and gives two different estimates of one trace.

    The test field's Jacobian is not diagonal, so that products with random vectors differ.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.numel() == 0 or transformed():
        return
    zeros = x.detach().new_zeros(_ROWS, *x.shape[1:])
    try:
        with torch.inference_mode(False):
            first, second = (estimate(estimator, _shear, 0.0, zeros.clone()).divergence for _ in range(2))
        # Up to another order of summation, which some devices choose at each call.
        same = torch.allclose(first, second, rtol=torch.finfo(first.dtype).eps ** 0.5)
    except Exception:  # it serves fields of another kind, or returns no estimate
        same = True
    if same:
        _DETERMINISTIC.add(type(estimator))
    else:
        name, row = type(estimator).__name__, int((first - second).abs().argmax())
        raise FieldError(
            f"{name} estimated two divergences of one field, {first[row].item():.6g} and then {second[row].item():.6g}, but declares itself "
            f"deterministic. Set stochastic = True in {name} and implement freeze(x, generator), which draws the random vectors once."
        )


def _shear(t: Tensor, x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat + 2 * flat.roll(1, dims=1)).view_as(x)


class Products(Protocol):
    """A field at a point: its value, and vector-Jacobian products there, as of a `Linearization`."""

    value: Tensor

    def pullback(self, vectors: Tensor, constant: bool = False) -> Tensor:
        """Return v^T J for every vector v, `(products, k, *event)`; without a graph if `constant`."""


class FrozenProbes(Estimator):
    """An estimator whose random vectors are drawn: it needs only a field's value and products."""

    frozen = True

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Return the value, the estimate and its standard error; `generator` is not used."""
        self.check(x)
        return self.from_products(linearize_field(g, t, x), x)

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Refuse an x of another shape than that for which the vectors were drawn."""

    @abstractmethod
    def from_products(self, field: Products, x: Tensor) -> Estimate:
        """Estimate the trace of the Jacobian behind `field` at x."""

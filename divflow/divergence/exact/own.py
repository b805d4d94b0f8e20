"""Fields that know their own divergence: objects with `value_and_divergence(t, x)`, always compared with autograd.

A structure that is known when the network is written, such as a sum over pairs or an output that does not see its own
input until the end, may have a closed form that no rule for single operations finds. The field offers that form. It is
verified like any plan: at the first call for a field, shape and grad mode, and again at calls 2, 4, 8, ...
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.method import Evaluation, Method, Prepared, Refusal
from divflow.errors import FieldError
from divflow.operators.dense import products_per_pass
from divflow.operators.field import Field, accumulation_dtype, checked_value, event_size, flatten_event
from divflow.operators.linearization import Linearization, linearize_field
from divflow.operators.plan import Plan, conditions
from divflow.tape.graph import graph_of
from divflow.tape.randomness import rng_states, set_rng_states
from divflow.tape.work import Work
from divflow.verification import agreement
from divflow.verification.kept import Plans
from divflow.verification.schedule import Schedule

__all__ = ["Own", "OwnDivergence", "own_divergence"]

OwnDivergence = Callable[..., tuple[Tensor, Tensor]]
"""`value_and_divergence(t, x)`: the value `(k, *event)` and its divergence `(k,)`, t being `()` or `(k,)`."""

# Dimensions up to which the whole diagonal is compared; above, an estimate by this many probes.
_LARGEST_DIAGONAL, _PROBES = 2**12, 64


def own_divergence(g: Field) -> OwnDivergence | None:
    """Return a field's method `value_and_divergence`, or None if it has none.

    Args:
        g: the field.
    """
    own = getattr(g, "value_and_divergence", None)
    return own if callable(own) else None


def _owner(g: Field) -> str:
    """The class whose method a field's own divergence is, which may be that of a part of the field."""
    own = own_divergence(g)
    if isinstance(own, functools.partial):  # made from the own divergence of another field
        own = own.args[0]
    return type(getattr(own, "__self__", g)).__name__


class _Known:
    """What is known of a field's own divergence: when it is compared, and its plan once someone asked for it."""

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.plan: Plan | None = None


_KNOWN: Plans[_Known] = Plans()


class Own(Method):
    """The divergence that a field computes itself."""

    name = "own"

    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared | Refusal:
        """Call the field's own divergence, and verify it if that is due.

        Raises:
            FieldError: method="own" was requested and the field has none; or it returns no value and divergence, or wrong
                ones.
        """
        g, t, x = evaluation.g, evaluation.t, evaluation.x
        if own_divergence(g) is None:
            if evaluation.asked:
                raise FieldError(
                    f"method='own' needs a field with a method value_and_divergence(t, x), but {type(g).__name__} has "
                    "none. Write one, or use method='auto', which works without."
                )
            return Refusal("not own: the field has no value_and_divergence")
        return Prepared(lambda: _plan(g, t, x), lambda: _evaluate(g, t, x))


def _evaluate(g: Field, t: Tensor, x: Tensor) -> ValueAndDivergence:
    """Compute the field's own value and divergence, verified at calls 1, 2, 4, 8, ...

    Args:
        g: a field with an own divergence.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`, not empty.

    Raises:
        FieldError: it returns no value and divergence, or other ones than autograd.
    """
    schedule, found = _KNOWN.of(_Known, g, *conditions(t, x)).schedule, _call(g, t, x)
    if schedule.due():
        with schedule.deciding():
            _verify(g, t, x)
    return found


def _plan(g: Field, t: Tensor, x: Tensor) -> Plan:
    """The plan for a field with an own divergence, whose cost is counted in one evaluation of each."""
    known = _KNOWN.of(_Known, g, *conditions(t, x))
    if known.plan is None:
        with torch.no_grad():
            value = Work.of(lambda: g(t, x.clone()))
            both = Work.of(lambda: _call(g, t, x))
        cost = both.operations / max(1, value.operations)
        why = f"the field's own, compared with autograd: {_owner(g)}.value_and_divergence"
        known.plan = Plan("own", why, 0, 1, cost, cost / 2, max(0, both.memory - value.memory))
    return known.plan


def _call(g: Field, t: Tensor, x: Tensor) -> ValueAndDivergence:
    """The own value and divergence, checked, in the caller's grad mode but outside of inference mode."""
    own, differentiable = own_divergence(g), torch.is_grad_enabled()
    assert own is not None
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        result = own(t.clone(), x.clone())
    if not isinstance(result, tuple) or len(result) != 2:
        raise FieldError(
            f"value_and_divergence must return two tensors, of shapes {tuple(x.shape)} and ({len(x)},), but returned a "
            f"{type(result).__name__}"
        )
    value, divergence = checked_value(result[0], x), result[1]
    if (
        not isinstance(divergence, Tensor)
        or divergence.shape != x.shape[:1]
        or divergence.device != x.device
        or divergence.is_complex()
    ):
        got: object = tuple(divergence.shape) if isinstance(divergence, Tensor) else type(divergence).__name__
        got = f"{divergence.dtype}" if isinstance(divergence, Tensor) and divergence.is_complex() else got
        raise FieldError(
            f"value_and_divergence must return one real divergence per sample, of shape ({len(x)},) on {x.device}, but returned "
            f"{got}. Sum over all event dimensions."
        )
    return ValueAndDivergence(value, divergence.to(accumulation_dtype(x)))


class _Point(NamedTuple):
    """Where an own divergence is verified: the first and the last sample, or all, as leaves."""

    g: Field
    t: Tensor
    x: Tensor

    @staticmethod
    def of(g: Field, t: Tensor, x: Tensor) -> "_Point":
        rows, of_rows = sorted({0, len(x) - 1}), getattr(g, "divflow_rows", lambda rows: g)
        if of_rows is None:  # it holds something that belongs to the batch as a whole
            rows, of_rows = list(range(len(x))), lambda rows: g
        few, graph = of_rows(rows), torch.is_grad_enabled()
        t = (t[rows] if t.ndim else t).detach().clone()
        return _Point(few, t.requires_grad_(graph and t.is_floating_point()), x[rows].detach().requires_grad_(graph))


def _verify(g: Field, t: Tensor, x: Tensor) -> None:
    states, graph = rng_states(x), torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graph), torch.autocast(x.device.type, enabled=False):
        point = _Point.of(g, t, x)
        own = _call(*point)
        set_rng_states(states)
        field = linearize_field(*point)
        set_rng_states(states)
        if field.value.isfinite().all():  # nothing can be compared at others
            _require(
                point,
                "the value",
                own.value,
                field.value,
                agreement.tolerance(x.dtype) * field.value.detach().abs().amax(),
            )
            compare = _verify_trace if event_size(x) <= _LARGEST_DIAGONAL else _verify_estimate
            compare(point, own, field)


def _verify_trace(point: _Point, own: ValueAndDivergence, field: Linearization) -> None:
    """Compare the divergence with the trace and, with a graph, the gradients of both and of the values."""
    leaves = _leaves(point, field.value, *own) if torch.is_grad_enabled() else []
    trace, scale, gradients = _trace(field, point.x, leaves)
    _require(point, "the divergence", own.divergence, trace, agreement.tolerance(point.x.dtype) * scale)
    if gradients is not None:
        pairs = [
            ("the value's", own.value, _gradients(field.value, leaves)),
            ("the divergence's", own.divergence, gradients),
        ]
        for whose, output, true in pairs:
            _verify_gradients(point, whose, _gradients(output, leaves), true, leaves)


def _verify_estimate(point: _Point, own: ValueAndDivergence, field: Linearization) -> None:
    """Compare with an estimate, in units of its standard error, if there are too many dimensions for more."""
    noise = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (_PROBES, *point.x.shape), generator=noise, device="cpu").to(point.x) * 2 - 1
    samples = flatten_event(torch.cat([field.pullback(v[None], constant=True) for v in probes]) * probes, 2).sum(dim=2)
    error = samples.std(dim=0) / _PROBES**0.5
    tolerance = 8 * error + agreement.tolerance(point.x.dtype) * samples.abs().mean(dim=0)
    _require(point, "the divergence", own.divergence, samples.mean(dim=0), tolerance)


def _verify_gradients(point: _Point, whose: str, own: list[Tensor], true: list[Tensor], leaves: list[Tensor]) -> None:
    largest = max(gradient.abs().nan_to_num(0, 0, 0).max() for gradient in true)
    for leaf, mine, gradient in zip(leaves, own, true, strict=True):
        name = {id(point.x): "x", id(point.t): "t"}.get(id(leaf), f"a parameter of shape {tuple(leaf.shape)}")
        tolerance = 10 * agreement.tolerance(leaf.dtype) * (gradient.abs().max() + largest / 100)
        _require(point, f"{whose} gradient in {name}", mine, gradient, tolerance)


def _require(point: _Point, what: str, own: Tensor, true: Tensor, tolerance: Tensor) -> None:
    """Require that two results agree.

    Raises:
        FieldError: with the entries that differ most.
    """
    error = (own.detach() - true.detach()).abs() - tolerance
    if (error <= 0).all() or not true.isfinite().all():
        return
    worst = error.nan_to_num(torch.inf).flatten().argmax()
    raise FieldError(
        f"the own divergence of {_owner(point.g)} is wrong: of {what}, value_and_divergence gives "
        f"{own.detach().flatten()[worst].item():.6g} where autograd finds {true.detach().flatten()[worst].item():.6g}, at "
        f"t = {point.t.detach().flatten()[0].item():.3g}. Correct it, or set value_and_divergence = None to do without it."
    )


def _trace(field: Linearization, x: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """The trace `(k,)` from rows of the Jacobian, the scale of its rounding, and the gradients of its weighted sum.

    The gradients are None if none are wanted, or if the field has no second derivatives.
    """
    size, step = event_size(x), products_per_pass(x)
    trace = x.new_zeros(len(x), dtype=accumulation_dtype(x))
    scale, gradients = trace.clone(), [torch.zeros_like(leaf) for leaf in leaves] if leaves else None
    for start in range(0, size, step):
        basis = x.new_zeros(min(step, size - start), size)
        basis.diagonal(start).fill_(1)
        vectors = basis.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        rows = flatten_event(field.pullback(vectors, constant=gradients is None), 2)
        entries = (rows * flatten_event(vectors, 2)).sum(dim=2).to(trace)
        trace = trace + entries.sum(dim=0).detach()
        scale = scale + entries.abs().sum(dim=0).detach() + torch.linalg.vector_norm(rows.detach(), dim=2).sum(0) / 100
        if gradients is not None:
            try:
                found = _gradients(entries.sum(dim=0), leaves)
            except RuntimeError:  # a custom Function that is differentiable once
                gradients = None
            else:
                gradients = [a + b for a, b in zip(gradients, found, strict=True)]
    return trace, scale, gradients


def _gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a sum in which samples and entries have different weights."""
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return list(torch.autograd.grad(output, leaves, weights, retain_graph=True, materialize_grads=True))


def _leaves(point: _Point, *outputs: Tensor) -> list[Tensor]:
    """What outputs can be differentiated in: x, t, and all else that their graphs start from."""
    variables = [point.x, point.t, *(getattr(node, "variable", None) for node in graph_of(*outputs))]
    unique = {id(variable): variable for variable in variables if variable is not None}
    return [leaf for leaf in unique.values() if leaf.requires_grad and leaf.numel()]

"""Fields that know their own divergence: objects with `value_and_divergence(t, x)`, compared with autograd before they are believed.

A structure that is known when the network is written, such as a sum over pairs or an output that does not see its own
input but at the end, may have a closed form that no rule for single operations finds. It is the field's own, and is
verified like any plan: at the first call for a field, shape and grad mode, and again at calls 2, 4, 8, ...
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from divflow.divergence.dense import products_per_pass
from divflow.divergence.estimator import ValueAndDivergence, accumulation_dtype
from divflow.divergence.field import (
    Field,
    FieldError,
    Linearization,
    checked_value,
    event_size,
    flatten_event,
    linearize_field,
)
from divflow.divergence.plan import Plan, circumstances
from divflow.divergence.transformed import transformed
from divflow.verification.graph import graph_of
from divflow.verification.kept import Plans
from divflow.verification.seeded import rng_states, set_rng_states

__all__ = ["OwnDivergence", "applies", "evaluate", "own_divergence", "plan"]

OwnDivergence = Callable[..., tuple[Tensor, Tensor]]
"""`value_and_divergence(t, x)`: the value `(k, *event)` and its divergence `(k,)`, t being `()` or `(k,)`."""

# Dimensions up to which the whole diagonal is compared; beyond, an estimate by this many probes is.
_LARGEST_DIAGONAL, _PROBES = 2**12, 64


def own_divergence(g: Field) -> OwnDivergence | None:
    """What a field offers as `value_and_divergence`; None if it offers none, or None."""
    own = getattr(g, "value_and_divergence", None)
    return own if callable(own) else None


def applies(method: str, g: Field, x: Tensor) -> bool:
    """Whether `Exact(method)` asks a field for its own divergence: if it has one, and there is anything to ask.

    Raises:
        FieldError: it must, and can't.
    """
    if method not in ("auto", "own") or x.numel() == 0 or torch.compiler.is_compiling() or transformed():
        return False
    if method == "own" and own_divergence(g) is None:
        raise FieldError(
            f"method='own' needs a field with a method value_and_divergence(t, x), but {type(g).__name__} has none; "
            "write one, or use method='auto', which does without"
        )
    return own_divergence(g) is not None


def _owner(g: Field) -> str:
    """The class of what a field's own divergence is a method of, which may be a part of the field."""
    return type(getattr(own_divergence(g), "__self__", g)).__name__


class _Calls:
    """How often a field's own divergence was asked for, and its plan once that was."""

    def __init__(self) -> None:
        self.number = 0
        self.plan: Plan | None = None


_CALLS: Plans[_Calls] = Plans()


def _calls(g: Field, t: Tensor, x: Tensor) -> _Calls:
    calls = _CALLS.get(g, *circumstances(t, x))
    if calls is None:
        calls = _Calls()
        _CALLS.keep(calls, g, *circumstances(t, x))
    return calls


def evaluate(g: Field, t: Tensor, x: Tensor) -> ValueAndDivergence:
    """What the field says of itself, verified at calls 1, 2, 4, 8, ...

    Args:
        g: a field with an own divergence.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`, not empty.

    Raises:
        FieldError: it returns no value and divergence, or others than autograd finds.
    """
    calls, found = _calls(g, t, x), _call(g, t, x)
    number = calls.number + 1
    if number & (number - 1) == 0:
        _verify(g, t, x)
    calls.number = number  # one that was refused is asked again at the next call
    return found


def plan(g: Field, t: Tensor, x: Tensor) -> Plan:
    """The plan for a field with an own divergence: its cost is counted, in one evaluation of the field and one of its own."""
    calls = _calls(g, t, x)
    if calls.plan is None:
        with torch.no_grad():
            value = _Work.of(lambda: g(t, x.clone()))
            both = _Work.of(lambda: _call(g, t, x))
        cost = both.operations / max(1, value.operations)
        why = f"the field's own, compared with autograd: {_owner(g)}.value_and_divergence"
        calls.plan = Plan("own", why, 0, 1, cost, cost / 2, max(0, both.memory - value.memory))
    return calls.plan


def _call(g: Field, t: Tensor, x: Tensor) -> ValueAndDivergence:
    """The own value and divergence, in the caller's grad mode but outside of inference mode, and checked."""
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
            f"value_and_divergence must return one real divergence a sample, of shape ({len(x)},) on {x.device}, but returned "
            f"{got}; sum over all event dimensions"
        )
    return ValueAndDivergence(value, divergence.to(accumulation_dtype(x)))


class _Point(NamedTuple):
    """Where an own divergence is verified: the first sample and the last, as leaves."""

    g: Field
    t: Tensor
    x: Tensor

    @staticmethod
    def of(g: Field, t: Tensor, x: Tensor) -> "_Point":
        rows = sorted({0, len(x) - 1})
        graph = torch.is_grad_enabled()
        few = getattr(g, "divflow_rows", lambda rows: g)(rows)
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
        if field.value.isfinite().all():  # nothing can be told of others
            _require(point, "the value", own.value, field.value, _tolerance(x) * field.value.detach().abs().amax())
            compare = _verify_trace if event_size(x) <= _LARGEST_DIAGONAL else _verify_estimate
            compare(point, own, field)


def _verify_trace(point: _Point, own: ValueAndDivergence, field: Linearization) -> None:
    """Compare the divergence with the trace, and with a graph the gradients of both and of the values."""
    leaves = _leaves(point, field.value, *own) if torch.is_grad_enabled() else []
    trace, scale, gradients = _trace(field, point.x, leaves)
    _require(point, "the divergence", own.divergence, trace, _tolerance(point.x) * scale)
    if gradients is not None:
        pairs = [
            ("the value's", own.value, _gradients(field.value, leaves)),
            ("the divergence's", own.divergence, gradients),
        ]
        for whose, output, true in pairs:
            _verify_gradients(point, whose, _gradients(output, leaves), true, leaves)


def _verify_estimate(point: _Point, own: ValueAndDivergence, field: Linearization) -> None:
    """Compare with an estimate, by its standard error: where there are too many dimensions for more."""
    noise = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (_PROBES, *point.x.shape), generator=noise, device="cpu").to(point.x) * 2 - 1
    samples = flatten_event(torch.cat([field.pullback(v[None], constant=True) for v in probes]) * probes, 2).sum(dim=2)
    error = samples.std(dim=0) / _PROBES**0.5
    tolerance = 8 * error + _tolerance(point.x) * samples.abs().mean(dim=0)
    _require(point, "the divergence", own.divergence, samples.mean(dim=0), tolerance)


def _verify_gradients(point: _Point, whose: str, own: list[Tensor], true: list[Tensor], leaves: list[Tensor]) -> None:
    largest = max(gradient.abs().nan_to_num(0, 0, 0).max() for gradient in true)
    for leaf, mine, gradient in zip(leaves, own, true, strict=True):
        name = {id(point.x): "x", id(point.t): "t"}.get(id(leaf), f"a parameter of shape {tuple(leaf.shape)}")
        tolerance = 10 * _tolerance(leaf) * (gradient.abs().max() + largest / 100)
        _require(point, f"{whose} gradient in {name}", mine, gradient, tolerance)


def _require(point: _Point, what: str, own: Tensor, true: Tensor, tolerance: Tensor) -> None:
    """That they agree.

    Raises:
        FieldError: naming the entries that differ most.
    """
    error = (own.detach() - true.detach()).abs() - tolerance
    if (error <= 0).all() or not true.isfinite().all():
        return
    worst = error.nan_to_num(torch.inf).flatten().argmax()
    raise FieldError(
        f"the own divergence of {_owner(point.g)} is wrong: of {what}, value_and_divergence gives "
        f"{own.detach().flatten()[worst].item():.6g} where autograd finds {true.detach().flatten()[worst].item():.6g}, at "
        f"t = {point.t.detach().flatten()[0].item():.3g}; correct it, or set value_and_divergence = None, to go without"
    )


def _tolerance(x: Tensor) -> float:
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(x.dtype, 0.05)


def _trace(field: Linearization, x: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """The trace `(k,)` by rows of the Jacobian, what its rounding is relative to, and the gradients of its weighted sum.

    These are None where no gradient is asked for, or the field has no second derivatives.
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
            except RuntimeError:  # of a custom Function that is differentiable once
                gradients = None
            else:
                gradients = [a + b for a, b in zip(gradients, found, strict=True)]
    return trace, scale, gradients


def _gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Those of a sum in which the samples and entries have different weights."""
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return list(torch.autograd.grad(output, leaves, weights, retain_graph=True, materialize_grads=True))


def _leaves(point: _Point, *outputs: Tensor) -> list[Tensor]:
    """What outputs can be differentiated in: x, t, and all else that their graphs start from."""
    variables = [point.x, point.t, *(getattr(node, "variable", None) for node in graph_of(*outputs))]
    unique = {id(variable): variable for variable in variables if variable is not None}
    return [leaf for leaf in unique.values() if leaf.requires_grad and leaf.numel()]


class _Work(TorchDispatchMode):
    """Counts multiplications of matrix products and convolutions, entries of all results, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.memory = 0, 0

    @staticmethod
    def of(function: Callable[[], object]) -> "_Work":
        """The work of a call."""
        with _Work() as work:
            function()
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        from torch.utils.flop_counter import flop_registry  # loaded where a cost is asked for

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) // 2
        if isinstance(result, Tensor) and not func.is_view:
            self.operations += result.numel()
            self.memory += result.numel() * result.element_size()
        return result

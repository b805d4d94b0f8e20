"""The exact divergence by forward mode, compared with reverse mode because torch has wrong rules for some operations.

`cholesky_inverse`, for example, has another derivative forward than in reverse (torch 2.13). So u^T J v is computed
both ways for fixed vectors u and v, and so is its gradient if one is wanted: at the first call for a field, shape and
grad mode, and again at calls 2, 4, 8, ...
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.method import Evaluation, Method, Prepared
from divflow.errors import FieldError
from divflow.operators.dense import basis, bounds, trace_of_chunk
from divflow.operators.field import (
    Field,
    accumulation_dtype,
    as_time,
    called,
    checked_state,
    checked_value,
    event_size,
    flatten_event,
)
from divflow.operators.linearization import linearize_field
from divflow.operators.plan import Plan, conditions
from divflow.operators.progress import report
from divflow.operators.transformed import forward_mode, transformed
from divflow.tape import NoRule
from divflow.tape.graph import graph_of
from divflow.tape.listening import Listening
from divflow.tape.operation import name_of
from divflow.tape.randomness import rng_states, set_rng_states
from divflow.tape.written import NORMALIZATIONS
from divflow.verification.agreement import tolerance
from divflow.verification.kept import Plans, kin
from divflow.verification.read_only import NoWrites, WritesError
from divflow.verification.schedule import Schedule

__all__ = ["Forward", "evaluate"]


# Of fields.
_SCHEDULES: Plans[Schedule] = Plans()


class Forward(Method):
    """Columns of the Jacobian, for fields with forward-mode rules."""

    name = "forward"

    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared:
        """Prepare any field; each pass computes the value with its columns."""
        x, size = evaluation.x, evaluation.size
        chunk = evaluation.products_per_pass(size)
        plan = Plan("forward", "asked for", size, chunk, 1 + size, (1 + size) / 2, evaluation.memory(chunk))
        return Prepared(lambda: plan, lambda: evaluate(evaluation.g, evaluation.t, x, chunk))


def evaluate(g: Field, t: Tensor | float, x: Tensor, chunk_size: int) -> ValueAndDivergence:
    """Compute the divergence from columns J e_i, `chunk_size` per pass, each pass with one evaluation of the field.

    A field that draws random numbers (dropout) draws the same ones in every pass. No graph of the evaluation is kept, so
    this needs the least memory if no gradient is wanted. All operations of the field need forward-mode and batching rules.

    Args:
        g: the field.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)`.
        chunk_size: columns per pass.

    Raises:
        FieldError: an operation has no rule, or a wrong one.
    """
    x = checked_state(x)
    t = as_time(t, x)
    value, divergence = x, x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
    if event_size(x) == 0 or x.shape[0] == 0:
        return ValueAndDivergence(checked_value(g(t, x.clone()), x), divergence)
    states = rng_states(x)
    for start, stop in bounds(event_size(x), chunk_size):
        if start:
            set_rng_states(states)
        value, columns = _columns(g, t, x, basis(x, start, stop))
        divergence = divergence + trace_of_chunk(columns, start, stop)
        report("products", stop, event_size(x))
    if transformed():  # there are no numbers to compare
        return ValueAndDivergence(value, divergence)
    schedule, after = _schedule(g, t, x), rng_states(x)
    if schedule.due():
        set_rng_states(states)
        try:
            with schedule.deciding():
                _verify(g, t, x, states)
        finally:
            set_rng_states(after)
    return ValueAndDivergence(value, divergence)


def _columns(g: Field, t: Tensor, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """g(t, x) and J v for every vector v, from one evaluation."""
    create_graph = torch.is_grad_enabled()

    def product(vector: Tensor) -> tuple[Tensor, Tensor]:
        with Listening(_WrittenOut(create_graph)):
            return jvp(lambda z: checked_value(called(g, t.clone(), z.clone()), x), (x,), (vector,))[:2]

    try:
        # Before torch 2.12 inference mode has no batching rule for dual tensors.
        with forward_mode(), torch.inference_mode(False), torch.set_grad_enabled(create_graph), _unhooked(create_graph):
            # None is allowed, but not within a vmap of the caller's.
            out_dims = 0 if transformed() else (None, 0)
            value, columns = vmap(product, out_dims=out_dims, randomness="same")(vectors)  # type: ignore[arg-type]
            return value[0] if transformed() else value, columns
    except (RuntimeError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("forward", "vmap", "jvp", "functorch", "functional transform")):
            raise  # the field's own
        raise FieldError(
            f"method='forward' does not apply to this field: {str(error).splitlines()[0]}. Use method='reverse'."
        ) from error


def _unhooked(create_graph: bool) -> contextlib.AbstractContextManager[None]:
    """Make a checkpoint an error inside: its second computation would lack the dual numbers of the first."""
    if not create_graph:
        return contextlib.nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks("a graph of forward mode can't be checkpointed")


class _WrittenOut:
    """A listener that gives normalizations the derivatives of simpler operations, and torch's own value.

    The derivative of torch's forward rules takes mean and deviation for constants (torch 2.13; pytorch#196700).

    Args:
        needed: whether the rules are differentiated.
    """

    def __init__(self, needed: bool) -> None:
        self._needed = needed

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a normalization both ways, and call anything else as it is."""
        value, name = func(*args, **kwargs), name_of(func)
        if not self._needed or name not in NORMALIZATIONS:
            return value
        try:
            written = NORMALIZATIONS[name](*args, **kwargs)
        except (NoRule, RuntimeError, ValueError, TypeError, IndexError):  # the comparison finds what is wrong then
            return value
        # The value bit for bit, less a zero that carries the derivative.
        return value.detach() - (written.detach() - written)


def _schedule(g: Field, t: Tensor, x: Tensor) -> Schedule:
    return _SCHEDULES.of(Schedule, kin(g), *conditions(t, x))


def _verify(g: Field, t: Tensor, x: Tensor, states: list[Tensor]) -> None:
    """Compare u^T (J v) with (u^T J) v and, with a graph, their gradients.

    Raises:
        FieldError: they differ.
    """
    noise = torch.Generator().manual_seed(0)
    u, v = (torch.randn(x.shape, generator=noise, dtype=torch.float64, device="cpu").to(x) for _ in range(2))
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graph):
        point = x.detach().clone().requires_grad_(graph)
        try:
            with NoWrites([]):
                value, column = _columns(g, t, point, v[None])
                set_rng_states(states)
                field = linearize_field(g, t, point)
            row = field.pullback(u[None])[0]
        except (RuntimeError, WritesError):  # no derivative in reverse, or another one at each evaluation
            return
        if not torch.allclose(value.detach(), field.value.detach(), rtol=1e-2):  # it keeps a state
            return
    along, back = flatten_event(column[0] * u), flatten_event(row * v)
    scale = along.detach().abs().sum(dim=1) + back.detach().abs().sum(dim=1)
    _require("product u^T J v", along.sum(dim=1), back.sum(dim=1), scale)
    if graph:
        _verify_gradients(along.sum(), back.sum(), point, field.value)


def _verify_gradients(forward: Tensor, reverse: Tensor, point: Tensor, value: Tensor) -> None:
    leaves = {id(point): point}
    for node in graph_of(value, reverse, forward):
        variable = getattr(node, "variable", None)
        if variable is not None and variable.requires_grad and variable.numel():
            leaves[id(variable)] = variable
    try:
        one, other = (
            torch.autograd.grad(it, [*leaves.values()], retain_graph=True, materialize_grads=True)
            if it.requires_grad
            else [torch.zeros_like(leaf) for leaf in leaves.values()]
            for it in (forward, reverse)
        )
    except RuntimeError:  # none to compare
        return
    largest = max(gradient.abs().amax() for gradient in (*one, *other))
    for mine, true in zip(one, other, strict=True):
        _require("gradient of it", mine, true, 10 * (true.abs().amax() + largest / 100))


def _require(what: str, forward: Tensor, reverse: Tensor, scale: Tensor) -> None:
    error = (forward.detach() - reverse.detach()).abs() - tolerance(forward.dtype) * scale
    if not reverse.isfinite().all() or (error <= 0).all():
        return
    worst = error.nan_to_num(torch.inf).flatten().argmax()
    raise FieldError(
        f"forward and reverse mode disagree on the {what}: forward mode gives "
        f"{forward.detach().flatten()[worst].item():.6g} and reverse mode {reverse.detach().flatten()[worst].item():.6g}. "
        "Torch's forward rule of an operation is wrong, or the field detaches something that depends on x, which forward mode "
        "does not see; use method='reverse' or 'auto'."
    )

"""Value, gradient and Laplacian of a scalar function of each sample, from one pass: where it applies, and how."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.divergence import dense
from divflow.divergence.field import (
    AtTime,
    FieldError,
    Linearization,
    as_time,
    checked_state,
    event_size,
    flatten_event,
    linearize,
)
from divflow.divergence.layered import NoRule
from divflow.divergence.plan import Plan, circumstances
from divflow.laplacian.jet import Jet
from divflow.laplacian.rules import RULES
from divflow.laplacian.tape import Tape
from divflow.laplacian.verify import require_equal, verify_operation
from divflow.verification.kept import Plans
from divflow.verification.recent import Recent
from divflow.verification.seeded import rng_states, set_rng_states
from divflow.verification.watch import watch

__all__ = ["Scalar", "ValueGradientLaplacian", "explain", "one_number_a_sample", "value_gradient_laplacian"]

Scalar = Callable[[Tensor, Tensor], Tensor]
"""f(t, x) -> (k,), one number a sample."""

# Elements of the tangents of one value in one pass. On a CPU more of them fall out of the cache, which doubles the
# time (measured, four hidden layers of 128, D = 64, batch 256: 43 ms with 2^18, 119 ms with 2^21).
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**18, 2**26
_FORWARD = "forward_laplacian"


class ValueGradientLaplacian(NamedTuple):
    """A scalar function of each sample: f of shape `(k,)`, its gradient `(k, *event)`, its Laplacian `(k,)`."""

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


class _Kept:
    """What is known of a function.

    Attributes:
        plan: None before there is one.
        calls: how many there were.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan, self.calls, self._surprised = plan, 0, False

    def due(self) -> bool:
        """Count a call: at calls 1, 2, 4, 8, ..., and after one that did something else, it is verified."""
        self.calls += 1
        due = self._surprised or self.calls & (self.calls - 1) == 0
        self._surprised = False
        return due

    def surprise(self) -> None:
        """Note that the function did what was not verified."""
        self._surprised = True


class _Followed(NamedTuple):
    """A function evaluated once.

    Attributes:
        point: the state that it was given.
        output: what it returned.
        tape: of what it did.
        create_graph: whether results keep theirs.
    """

    point: Tensor
    output: Tensor
    tape: Tape
    create_graph: bool

    def structure(self) -> Hashable:
        """What was done to the state, equal for evaluations that need not be verified twice.

        Raises:
            NoRule: it is not known.
        """
        if self.tape.hides(self.output):
            raise NoRule("a part is hidden from torch functions, as a custom autograd.Function is")
        if self.output.dtype != self.point.dtype:
            raise NoRule(f"its value has {self.output.dtype}, not the state's {self.point.dtype}")
        return self.tape.structure(self.output), self.output.dtype, self.output.device

    def derivatives(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """First derivatives along m directions `(m, 1 or k, *event)`, `(m, k)`, and the sum of the second ones, `(k,)`.

        Raises:
            NoRule: they are not known.
        """
        with torch.inference_mode(False), torch.set_grad_enabled(self.create_graph):
            jet = self.tape.carry(self.output, [Jet(directions)])
        zeros = directions.new_zeros(len(directions), *self.output.shape)
        if jet is None:
            return zeros, zeros[0]
        return jet.first, zeros[0] if jet.second is None else jet.second[0]

    def gradient(self) -> Linearization:
        """The gradient by autograd, ready for products with the Hessian."""
        with torch.inference_mode(False), torch.enable_grad():
            if not self.output.requires_grad:
                return Linearization(torch.zeros_like(self.point), self.point, self.create_graph)
            (gradient,) = torch.autograd.grad(
                self.output, self.point, torch.ones_like(self.output), create_graph=True, materialize_grads=True
            )
        return Linearization(gradient, self.point, self.create_graph)


# Of functions, by their identity; and the structures that were right, whatever function had them.
_KEPT: Plans[_Kept] = Plans()
_RIGHT: Recent[bool] = Recent(4096)


def value_gradient_laplacian(f: Scalar, t: Tensor | float, x: Tensor) -> ValueGradientLaplacian:
    """f(t, x), its gradient and its Laplacian in x, from one evaluation.

    Where all of its operations have rules, they are carried forward together: D tangents through each operation, and
    one second derivative for all of them (Li et al. 2023, arXiv 2307.08214). Every operation, and every structure, is
    compared with autograd where it is first seen. Anything else takes D products with the Jacobian of the gradient.

    Args:
        f: called as f(t, x), returns `(k,)`.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.

    Raises:
        FieldError: f does not return one number a sample, or mixes samples, or t or x is not what it should be.
    """
    x = checked_state(x)
    t = as_time(t, x)
    kept = _kept(f, t, x)
    if kept.plan is not None and kept.plan.method != _FORWARD:
        return _dense(_evaluated(f, t, x, products=True), x)
    return _forward_or_dense(f, t, x, kept, kept.due())


def explain(f: Scalar, t: Tensor | float, x: Tensor) -> Plan:
    """What `value_gradient_laplacian` does with these arguments, why, and what it is expected to cost.

    The function is evaluated, unless that is known already. Costs are relative to its value.
    """
    x = checked_state(x)
    t = as_time(t, x)
    kept = _kept(f, t, x)
    if kept.plan is None:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            _forward_or_dense(f, t, x, kept, kept.due())
    return kept.plan or _dense_plan(x, "the gradient is not finite, so nothing can be verified")


def one_number_a_sample(value: Tensor, x: Tensor) -> Tensor:
    """Return the value of a scalar function of each sample, refused unless it is `(k,)`.

    Raises:
        FieldError: it is not.
    """
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise FieldError(
            f"f must return one number a sample, shape ({x.shape[0]},), but returned {found}; "
            "sum over the event dimensions"
        )
    return value


def _kept(f: Scalar, t: Tensor, x: Tensor) -> _Kept:
    reason = _refusal(x)
    if reason is not None:
        return _Kept(_dense_plan(x, reason))
    kept = _KEPT.get(f, *circumstances(t, x))
    if kept is None:
        kept = _Kept()
        _KEPT.keep(kept, f, *circumstances(t, x))
    return kept


def _refusal(x: Tensor) -> str | None:
    """Why the forward pass is not even tried."""
    if torch.compiler.is_compiling():
        return "torch.compile does not follow it"
    if x.numel() == 0:
        return "there is nothing to gain"
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
        return "second derivatives are carried in float32 and float64 only"
    return None


def _forward_or_dense(f: Scalar, t: Tensor, x: Tensor, kept: _Kept, thorough: bool) -> ValueGradientLaplacian:
    """One evaluation, and the forward pass if its structure is known or, where it is thorough, found to be right."""
    products, states = thorough or torch.is_grad_enabled(), rng_states(x)
    try:
        followed = _evaluated(f, t, x, products, verify=thorough)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # Without products x needs no gradient, which a function may ask of it: then it is evaluated as autograd would.
        if products:
            raise
        followed = None
    if thorough and followed is not None:
        _require_own(followed.point, followed.output)
    reason = "it did other operations than before"
    try:
        if followed is not None and (thorough or _RIGHT.get(followed.structure())):
            return _forward(followed, x, kept, thorough)
    except NoRule as error:
        reason = str(error).rstrip(",")
    if followed is None or not products:
        set_rng_states(states)
        return _forward_or_dense(f, t, x, kept, thorough=True)
    kept.surprise()
    result = _dense(followed, x)
    if thorough and result.gradient.isfinite().all():
        kept.plan = _dense_plan(x, reason)
    return result


def _evaluated(f: Scalar, t: Tensor, x: Tensor, products: bool, verify: bool = False) -> _Followed:
    """Evaluate, following what is done to x.

    Args:
        f: the function.
        t: time.
        x: states.
        products: whether a graph from x is needed, for the gradient by autograd.
        verify: whether every operation is compared with autograd.
    """
    at_time = AtTime(f, t)
    watcher = watch(at_time, x)
    products = products or watcher is not None
    differentiable, wanted = products or torch.is_grad_enabled(), torch.is_grad_enabled()
    seen: list[tuple[Tensor, Tensor, Tape]] = []

    def followed(z: Tensor) -> Tensor:
        tape = Tape([z], RULES, differentiable, verify_operation if verify else None)
        with tape:
            output = at_time(z) if watcher is None else watcher(z)
        seen.append((z, output, tape))
        return output

    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        at = linearize(followed, x, one_number_a_sample, products, watched=watcher or False)
    return _Followed(*seen[0], create_graph=wanted and at.create_graph)


def _forward(followed: _Followed, x: Tensor, kept: _Kept, thorough: bool) -> ValueGradientLaplacian:
    structure = followed.structure()
    chunk = _chunk_size(x, followed.tape)
    first, laplacian = [], x.new_zeros(x.shape[0])
    for directions in _basis(x).split(chunk):
        slopes, curvature = followed.derivatives(directions)
        first.append(slopes)
        laplacian = laplacian + curvature
    gradient = torch.cat(first).mT.reshape(x.shape)
    if thorough and (kept.calls > 1 or not _RIGHT.get(structure)):
        _verify(followed, gradient)
        _RIGHT.keep(structure, True)
    if kept.plan is None:
        kept.plan = _forward_plan(x, followed.tape, chunk)
    return _shown(followed, gradient, laplacian)


def _require_own(point: Tensor, output: Tensor) -> None:
    """Refuse a function whose value at the first sample depends on another sample's state."""
    if not output.requires_grad:
        return
    rows = torch.zeros_like(output)
    rows[:1] = 1
    (own,) = torch.autograd.grad(output, point, rows, retain_graph=True, materialize_grads=True)
    if (own[1:].abs() > 0).any():
        raise FieldError(
            f"f mixes the samples of a batch: its value at sample 0, of values of shape {tuple(output.shape)}, depends "
            f"on other samples of x, of shape {tuple(point.shape)}; look for normalization, attention or statistics "
            "taken over dimension 0"
        )


def _verify(followed: _Followed, gradient: Tensor) -> None:
    """Compare the gradient, and the second derivatives along two random directions, with autograd.

    Raises:
        NoRule: they disagree.
    """
    point = followed.point
    at = followed.gradient()
    true, known = flatten_event(at.value.detach()), flatten_event(gradient.detach())
    scale = true.abs().sum(dim=1, keepdim=True)
    require_equal(known, true, scale, "the gradient is another")
    noise = torch.Generator().manual_seed(0)
    directions = torch.randn((2, *point.shape), generator=noise, dtype=torch.float64).to(point)
    products = flatten_event(torch.stack([at.pullback(v[None], constant=True)[0] * v for v in directions]).sum(dim=0))
    _, second = followed.derivatives(directions)
    known, scale, slack = second.detach(), products.abs().sum(dim=1), true.abs().sum(dim=1)
    require_equal(known, products.sum(dim=1), scale, "the Laplacian is another", slack)


def _dense(followed: _Followed, x: Tensor) -> ValueGradientLaplacian:
    """D products with the Jacobian of the gradient."""
    at = followed.gradient()
    chunk = min(dense.products_per_pass(x), max(1, event_size(x)))
    return _shown(followed, at.value, dense.reverse(at, x, chunk, recompute=False))


def _shown(followed: _Followed, gradient: Tensor, laplacian: Tensor) -> ValueGradientLaplacian:
    results = followed.output, gradient, laplacian
    return ValueGradientLaplacian(*(z if followed.create_graph else z.detach() for z in results))


def _basis(x: Tensor) -> Float[Tensor, "directions one *event"]:
    size = event_size(x)
    return torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])


def _chunk_size(x: Tensor, tape: Tape) -> int:
    limit = _CPU_ELEMENTS if x.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(1, min(event_size(x), limit // max(1, tape.widest)))


def _forward_plan(x: Tensor, tape: Tape, chunk: int) -> Plan:
    size = event_size(x)
    why = f"value, gradient and Laplacian from one pass of {size} tangents through {len(tape.signature)} operations"
    return Plan(_FORWARD, why, size, chunk, 1 + size, (1 + size) / 4, 3 * chunk * tape.widest * x.element_size())


def _dense_plan(x: Tensor, why: str) -> Plan:
    """A product with the Hessian takes about two forward passes, one with it beside the gradient four."""
    size = event_size(x)
    chunk = min(dense.products_per_pass(x), max(1, size))
    cost = 2 + 2 * size
    return Plan(
        "reverse", f"dense products: {why}", size, chunk, cost, cost / 4, chunk * 2 * x.numel() * x.element_size()
    )

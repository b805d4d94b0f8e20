"""Value, gradient and Laplacian of a scalar function of each sample, from one pass: where it applies, and how."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.errors import FieldError
from divflow.operators import dense
from divflow.operators.compiled import eagerly
from divflow.operators.field import as_time, checked_state, event_size, flatten_event
from divflow.operators.forward_laplacian.costs import FORWARD, dense_plan, forward_plan, require_cheaper
from divflow.operators.forward_laplacian.followed import Followed, Scalar, evaluated, one_number_a_sample
from divflow.operators.forward_laplacian.transformed import by_transforms
from divflow.operators.plan import Plan, conditions
from divflow.operators.transformed import transformed
from divflow.tape import NoRule, Tape
from divflow.tape.cache import Cache
from divflow.tape.checkpoints import CheckpointedError
from divflow.tape.randomness import rng_states, set_rng_states
from divflow.verification.agreement import tolerance
from divflow.verification.kept import Plans
from divflow.verification.schedule import Schedule

__all__ = [
    "ValueGradientLaplacian",
    "explain",
    "value_gradient_laplacian",
]

# Elements of the tangents of one value in one pass. On a CPU more of them fall out of the cache, which doubles the
# time (measured, four hidden layers of 128, D = 64, batch 256: 43 ms with 2^18, 119 ms with 2^21).
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**18, 2**26


class ValueGradientLaplacian(NamedTuple):
    """A scalar function of each sample, with its gradient and its Laplacian.

    Of a complex function all three are complex: the derivatives of its real part, plus i times those of its imaginary part.

    Attributes:
        value: f, `(k,)`.
        gradient: `(k, *event)`.
        laplacian: `(k,)`.
    """

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


class _Kept:
    """What is known of a function.

    Attributes:
        plan: None before there is one.
        schedule: of its calls.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan, self.schedule = plan, Schedule()


# Of functions, by their identity; and the structures that were right, whatever function had them.
_KEPT: Plans[_Kept] = Plans()
_RIGHT: Cache[bool] = Cache(4096)


@eagerly
def value_gradient_laplacian(f: Scalar, t: Tensor | float, x: Tensor) -> ValueGradientLaplacian:
    """Compute f(t, x), its gradient and its Laplacian in x, from one evaluation.

    If all operations have rules, D tangents are carried forward through each operation, and one second derivative for all
    of them (Li et al. 2023, arXiv 2307.08214). Every operation, and every structure, is compared with autograd when it is
    first seen. Any other function takes D products with the Jacobian of the gradient.

    Args:
        f: `f(t, x) -> (k,)`, real or complex.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.

    Raises:
        FieldError: f does not return one number per sample, or mixes samples, or t or x is invalid.
    """
    x = checked_state(x)
    t = as_time(t, x)
    if transformed():
        return ValueGradientLaplacian(*by_transforms(f, t, x, one_number_a_sample))
    kept = _kept(f, t, x)
    if kept.plan is not None and kept.plan.method != FORWARD:
        return _dense(evaluated(f, t, x, products=True, recorded=False), x)
    return _forward_or_dense(f, t, x, kept, kept.schedule.due())


@eagerly
def explain(f: Scalar, t: Tensor | float, x: Tensor) -> Plan:
    """Report what `value_gradient_laplacian` does with these arguments, why, and what it is expected to cost.

    The function is evaluated, unless its plan is known. Costs are relative to its value.

    Args:
        f: `f(t, x) -> (k,)`.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
    """
    x = checked_state(x)
    t = as_time(t, x)
    kept = _kept(f, t, x)
    if kept.plan is None:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            _forward_or_dense(f, t, x, kept, kept.schedule.due())
    return kept.plan or dense_plan(x, "the gradient is not finite, so nothing can be verified")


def _kept(f: Scalar, t: Tensor, x: Tensor) -> _Kept:
    reason = _refusal(x)
    if reason is not None:
        return _Kept(dense_plan(x, reason))
    return _KEPT.of(_Kept, f, *conditions(t, x))


def _refusal(x: Tensor) -> str | None:
    """Why the forward pass is not even tried."""
    if transformed():
        return "within a transform of torch.func nothing can be verified"
    if x.numel() == 0:
        return "there is nothing to gain"
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
        return "second derivatives are carried in float32 and float64 only"
    return None


def _forward_or_dense(f: Scalar, t: Tensor, x: Tensor, kept: _Kept, thorough: bool) -> ValueGradientLaplacian:
    """One evaluation, and the forward pass if its structure is known or, where it is thorough, found to be right."""
    products, states = thorough or torch.is_grad_enabled(), rng_states(x)
    try:
        followed = evaluated(f, t, x, products, verify=thorough)
    except (torch.OutOfMemoryError, FieldError):
        raise
    except Exception as error:
        # Without products x needs no gradient, which a function may ask of it: then it is evaluated as autograd would.
        if products:
            return _not_followed(f, t, x, kept, states, error)
        followed = None
    reason = "its operations differ from those of earlier calls"
    try:
        if followed is not None and (thorough or _RIGHT.get(followed.structure())):
            return _forward(followed, x, kept, thorough)
    except NoRule as error:
        reason = str(error).rstrip(",")
    if followed is None or not products:
        set_rng_states(states)
        return _forward_or_dense(f, t, x, kept, thorough=True)
    kept.schedule.surprise()
    result = _dense(followed, x)
    if thorough and result.gradient.isfinite().all():
        kept.plan = dense_plan(x, reason)
    return result


def _not_followed(
    f: Scalar, t: Tensor, x: Tensor, kept: _Kept, states: list[Tensor], error: Exception
) -> ValueGradientLaplacian:
    """Evaluate a function that fails while it is followed; an error of the function itself is raised."""
    set_rng_states(states)
    result = _dense(evaluated(f, t, x, products=True, recorded=False), x)
    why = (
        str(error) if isinstance(error, CheckpointedError) else f"it raises {type(error).__name__} while it is followed"
    )
    kept.plan = dense_plan(x, why)
    return result


def _forward(followed: Followed, x: Tensor, kept: _Kept, thorough: bool) -> ValueGradientLaplacian:
    structure = followed.structure()
    chunk = _chunk_size(x, followed.tape)
    first, laplacian = [], x.new_zeros(x.shape[0])
    for directions in _basis(x).split(chunk):
        slopes, curvature = followed.derivatives(directions)
        first.append(slopes)
        laplacian = laplacian + curvature
    gradient = torch.cat(first).mT.reshape(x.shape)
    if thorough and (kept.schedule.calls > 1 or not _RIGHT.get(structure)):
        require_cheaper(followed.reader, event_size(x))
        _verify(followed, gradient)
        _RIGHT.keep(structure, True)
    if kept.plan is None:
        kept.plan = forward_plan(x, followed.tape, followed.reader, chunk)
    return _results(followed, gradient, laplacian)


def _verify(followed: Followed, gradient: Tensor) -> None:
    """Compare the gradient, and the second derivatives along two random directions, with autograd.

    Raises:
        NoRule: they disagree.
    """
    point = followed.point
    at = followed.gradient(followed.output)
    true, known = flatten_event(at.value.detach()), flatten_event(gradient.detach())
    scale = true.abs().sum(dim=1, keepdim=True)
    _require_equal(known, true, scale, "the gradient is another")
    noise = torch.Generator().manual_seed(0)
    directions = torch.randn((2, *point.shape), generator=noise, dtype=torch.float64, device="cpu").to(point)
    products = flatten_event(torch.stack([at.pullback(v[None], constant=True)[0] * v for v in directions]).sum(dim=0))
    _, second = followed.derivatives(directions)
    known, scale, slack = second.detach(), products.abs().sum(dim=1), true.abs().sum(dim=1)
    _require_equal(known, products.sum(dim=1), scale, "the Laplacian is another", slack)


def _require_equal(known: Tensor, true: Tensor, scale: Tensor, reason: str, slack: Tensor | float = 0.0) -> None:
    """That numbers agree, in their precision, relative to a scale; the rounding of a slack is no difference.

    Raises:
        NoRule: they don't, for that reason.
    """
    allowed = tolerance(known.dtype) * (scale + true.abs()) + 64 * torch.finfo(known.dtype).eps * slack
    if not ((known - true).abs() <= allowed).all():
        raise NoRule(reason)


def _dense(followed: Followed, x: Tensor) -> ValueGradientLaplacian:
    """D products with the Jacobian of the gradient, of either part where the function is complex."""
    chunk = min(dense.products_per_pass(x), max(1, event_size(x)))
    gradients, laplacians = [], []
    for part in followed.parts():
        at = followed.gradient(part)
        gradients.append(at.value)
        laplacians.append(dense.reverse(at, x, chunk, recompute=False))
    joined = (torch.complex(*parts) if len(parts) == 2 else parts[0] for parts in (gradients, laplacians))
    return _results(followed, *joined)


def _results(followed: Followed, gradient: Tensor, laplacian: Tensor) -> ValueGradientLaplacian:
    results = followed.output, gradient, laplacian
    return ValueGradientLaplacian(*(z if followed.create_graph else z.detach() for z in results))


def _basis(x: Tensor) -> Float[Tensor, "directions one *event"]:
    size = event_size(x)
    return torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])


def _chunk_size(x: Tensor, tape: Tape) -> int:
    limit = _CPU_ELEMENTS if x.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(1, min(event_size(x), limit // max(1, tape.widest)))

"""Check that a function is a field: samples are independent, no state is carried on, and autograd sees all it does to x."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from divflow.divergence.around import OnManifold, around
from divflow.divergence.estimator import Estimator
from divflow.divergence.exact.conditioned import given
from divflow.divergence.hutchinson import Hutchinson
from divflow.errors import FieldError, FieldWarning
from divflow.operators.compiled import eagerly
from divflow.operators.context import Context
from divflow.operators.differentiating import differentiates, evaluated, note_differentiates
from divflow.operators.field import AtTime, Field, as_time, checked_field, checked_state, checked_value
from divflow.operators.linearization import linearize_field
from divflow.operators.transformed import refuse_transforms
from divflow.verification.copies import CopyError, copied
from divflow.verification.gradients import check_gradient
from divflow.verification.schedule import answer, record_of, severed_fields
from divflow.verification.seeded import seeded

__all__ = ["accepts_sample_times", "check_field", "check_sample_times", "fresh_copy"]


@eagerly
@torch.no_grad()
def check_field(
    g: Callable[..., Tensor],
    t: Tensor | float,
    x: Tensor,
    *,
    detached: bool = False,
    gradient: bool = False,
    estimator: Estimator | None = None,
    context: Context | None = None,
) -> None:
    """Check a field before training: refuse one that mixes samples, remembers earlier ones, or hides a derivative.

    - **It mixes**: values at some samples depend on others. Every second sample is changed; the values at the others must
      stay. The check uses a copy whose all-zero parameters are perturbed, because a last layer that starts at zero would
      hide what comes before.
    - **It remembers**: its value depends on earlier inputs, like a recurrent network that keeps its state. A field that
      changes its own buffers whatever its input, like spectral normalization in training mode, is accepted with a warning.
    - **It hides a derivative**: something that depends on x has no graph leading there (`detach`, `no_grad`, numpy, a
      gradient without `create_graph`), and central differences find another derivative than autograd.

    The check costs a few evaluations. Call it once before training.

    Args:
        g: the field.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)` such as the field will receive.
        detached: True skips the third check, for a field that detaches on purpose, like `severed_fields("allow")`.
        gradient: True also compares the derivatives of the field and of its divergence with central differences, as tasks
            do before the first training step. An operation may have a right first and a wrong second derivative (see
            `divflow.verification.gradients`).
        estimator: of that divergence. For a stochastic one, whose gradient need not be that of its estimate, or if None,
            one probe of `Hutchinson` is taken.
        context: passed to the field as `g(t, x, context)`, as in `divergence`.

    Raises:
        FieldError: one of these faults, with the module or the line if it can be found; or a wrong shape, dtype or device.

    Warns:
        FieldWarning: the field changes its own state at each evaluation, or can't be copied and checked.

    Example:
        >>> check_field(lambda t, x: t * x, 0.5, torch.ones(4, 2))
        >>> check_field(lambda t, x: x - x.mean(dim=0), 0.5, torch.ones(4, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        divflow.errors.FieldError: the field mixes the samples of a batch: ...
    """
    refuse_transforms("check_field", "call it once beforehand")
    x = checked_state(x)
    t, g = as_time(t, x), given(checked_field(g), context, x)
    if around(g, x, estimated=False) is not None:  # it refuses points off a manifold; what follows changes them
        g = cast(OnManifold, g).divflow_nearby
    if x.numel() == 0:
        checked_value(evaluated(g, t, x.clone()), x)
        return
    alone = g, t, x
    if len(x) == 1:
        x = x.expand(2, *x.shape[1:])
        t = t if t.ndim == 0 else t.expand(2)
        of_rows = getattr(g, "divflow_rows", None)
        g = g if of_rows is None else of_rows([0, 0])
    _check_samples(g, t, x)
    with severed_fields("allow" if detached or answer() == "allow" else "refuse"):
        field, _ = fresh_copy(g)
        record_of(AtTime(field, t), x).wrong = True  # which makes the next call one that is verified
        linearize_field(field, t, x)
        if gradient:
            estimated = estimator is None or estimator.stochastic or estimator.frozen
            check_gradient(*alone, Hutchinson() if estimator is None or estimated else estimator)


def _check_samples(g: Field, t: Tensor, x: Tensor) -> None:
    """Check that values do not depend on other samples of the same batch or of an earlier one."""
    noise = torch.Generator("cpu").manual_seed(0)
    changed = x.clone()
    steps = torch.randn(changed[1::2].shape, generator=noise, device="cpu").to(x)
    changed[1::2] += steps * (1 + x.abs().max())
    field, fresh = fresh_copy(g)
    before = _same_randomness(field, t, x)
    if differentiates(field) and not differentiates(g):
        # An evaluation that was refused found this, and drew random numbers: start again with copies that know it.
        note_differentiates(g)
        _check_samples(g, t, x)
        return
    again = _same_randomness(field, t, x)
    other, fresh_too = fresh_copy(g)
    after = _same_randomness(other, t, changed)
    changes = not _equal(before, again)
    if not changes or (fresh and fresh_too):
        _require_own(g, before[0::2], after[0::2])
    if not changes:
        return
    if not (fresh and fresh_too):
        warnings.warn(
            f"{_name(g)} returns another value at each evaluation and can't be copied, so whether it mixes the samples of a "
            "batch is not known. Keep its state in an nn.Module, or reset it at each call.",
            FieldWarning,
            stacklevel=3,
        )
        return
    # The same call, after one of x and after one of other states.
    if not _equal(_same_randomness(other, t, x), again):
        raise FieldError(
            f"{_name(g)} remembers earlier calls: at the same t, x and random numbers its value depends on the states that "
            "it received before, so it is not a function of t and x and has no divergence. Reset what it keeps at each call "
            "(a hidden state, a cache, running statistics)."
        )
    warnings.warn(
        f"{_name(g)} changes its own state at each evaluation, whatever x is, like spectral normalization in training mode, "
        "so each evaluation is of a slightly different field. Use eval mode to keep it fixed.",
        FieldWarning,
        stacklevel=3,
    )


def _require_own(g: Field, before: Tensor, after: Tensor) -> None:
    scale = before.abs().amax() + after.abs().amax()
    difference = (before - after).abs().amax()
    if difference > scale * torch.finfo(before.dtype).eps ** 0.5:
        raise FieldError(
            f"the field mixes the samples of a batch: changing some samples changed the values at others by up to "
            f"{difference.item():.3g}, so its divergence would be wrong. {_remedy(g)}"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two values agree up to another order of summation."""
    scale = a.abs().nan_to_num(0, 0, 0).amax() + b.abs().nan_to_num(0, 0, 0).amax()
    return not bool(((a - b).abs() > 64 * torch.finfo(a.dtype).eps * scale).any())


def fresh_copy(g: Any) -> tuple[Any, bool]:
    """Copy a field in its present state, with its all-zero parameters perturbed.

    Args:
        g: the field.

    Returns:
        The copy and True, or g itself and False if it can't be copied.
    """
    try:
        field = copied(g).field
    except CopyError:
        return g, False
    if differentiates(g):
        note_differentiates(field)
    return field, True


@torch.no_grad()
def accepts_sample_times(g: Field, start: float, stop: float, x: Tensor) -> bool:
    """Test whether a field takes one time per sample.

    True if `g(t, x)` with t `(k,)` equals g at each of these times as a scalar. Many networks are written for a scalar t
    only; given `(k,)` they raise, or broadcast t against the wrong dimension where k happens to fit. Costs three
    evaluations, on a copy.

    Args:
        g: the field.
        start: the first time.
        stop: the last time.
        x: states `(k, *event)`.
    """
    field, _ = fresh_copy(g)
    # Zero or equal states would hide what t is broadcast against.
    noise = torch.randn(x.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(x)
    x = x + 0.01 * (1 + x.abs().max()) * noise
    times = torch.linspace(start, stop, len(x), dtype=x.dtype, device=x.device)
    try:
        together = _same_randomness(field, times, x)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # whatever type its own checks of t raise
        return False
    for row in (0, -1):
        alone = _same_randomness(field, times[row], x)[row]
        # False for NaN, which shows nothing.
        if not (together[row] - alone).abs().max() <= together.abs().max() * torch.finfo(x.dtype).eps ** 0.5:
            return False
    return True


def check_sample_times(g: Field, start: float, stop: float, x: Tensor, who: str) -> None:
    """Refuse a field that does not take one time per sample, as `accepts_sample_times` finds.

    Args:
        g: the field.
        start: the first time that it will receive.
        stop: the last time.
        x: states such as it will receive, at least one; the test needs two.
        who: the start of the message, such as `flow matching draws ..., but the velocity`.

    Raises:
        FieldError: with the shape of the times and the remedy.
    """
    if not accepts_sample_times(g, start, stop, x):
        raise FieldError(
            f"{who} takes scalar times only, or mixes up the times of a batch: with t of shape ({len(x)},) it fails, or differs "
            "from its values at these times one by one. Bring t to the columns of x inside it: t.reshape(-1, 1).expand(len(x), 1)."
        )


def _same_randomness(field: Field, t: Tensor, x: Tensor) -> Tensor:
    devices = [x.device] if x.is_cuda else []
    # Without autocast, whose rounding would hide small differences or look like one.
    with seeded(0, devices), torch.autocast(x.device.type, enabled=False):
        return checked_value(evaluated(field, t.clone(), x.clone()), x).detach()


def _name(g: Field) -> str:
    return f"the field ({type(g).__name__})" if isinstance(g, nn.Module) else "the field"


def _remedy(g: Field) -> str:
    if isinstance(g, nn.Module):
        for name, module in g.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                return (
                    f"{name or 'The field'} is a {type(module).__name__} that normalizes over the batch: "
                    "use GroupNorm or LayerNorm, or put it in eval mode."
                )
    return "Look for normalization, attention or statistics taken over dimension 0."

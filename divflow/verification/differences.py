"""A field's derivative along one direction by central differences, which decides if autograd is suspect.

In float64, on a copy, the difference has about eight digits, and its small step crosses no kink. In float32 it has two,
and the kinks of a network of ReLUs lie within its step: there it can only detect that a derivative is missing
altogether.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from divflow.verification.copies import CopyError, copied
from divflow.verification.read_only import NoWrites, WritesError
from divflow.verification.seeded import seeded

__all__ = ["Difference", "compare"]

Function = Callable[[Tensor], Tensor]

# Steps in units of the state, in the order in which they are tried.
_STEPS = {torch.float64: (1e-6, 1e-5, 1e-7, 1e-4, 1e-3, 1e-8), torch.float32: (1e-2, 3e-3, 3e-2, 1e-1, 3e-1)}
# Fractions of a directional derivative that count as agreement, and by which two differences may differ: more if
# autograd finds nothing at all, because that detects networks of whole numbers, whose values have steps.
_AGREES = {torch.float64: 1e-5, torch.float32: 2e-2}
_CONSISTENT, _CONSISTENT_WITH_NOTHING = 0.1, 0.25
# By which fraction of the state the point is moved, away from kinks on which data lie, such as zero.
_MOVED = 1e-3


class Difference(NamedTuple):
    """The result of a comparison.

    Attributes:
        verdict: "right", "wrong", or "unknown" if nothing could be compared.
        certain: whether a wrong one was found in float64, or is one of which autograd finds nothing.
        telling: whether a right one is of a derivative that is not zero.
        missed: the fraction of the directional derivative that autograd misses.
        difference: w^T J v by differences, of the sample with the largest fraction missed.
        autograd: by autograd.
        why: the reason why it is unknown.
    """

    verdict: str
    certain: bool = False
    telling: bool = False
    missed: float = 0.0
    difference: float = 0.0
    autograd: float = 0.0
    why: str = ""


def compare(function: Function, x: Tensor) -> Difference:
    """Compute the derivative of a function along one random direction, by autograd and by central differences.

    Args:
        function: of the state alone; evaluated on a copy or, if it can't be copied, kept from writing.
        x: states `(k, *event)`.
    """
    try:
        return _compared(_resetting(function, double=True), x.detach().double(), certain=True)
    except torch.OutOfMemoryError:
        return Difference("unknown", why="it takes too much memory")
    except _UnlikeError as error:
        if str(error):
            return Difference("unknown", why=str(error))
    except Exception:  # it can't be copied, or computes in one precision only
        pass
    if x.dtype not in (torch.float32, torch.float64):
        return Difference("unknown", why="it can't be evaluated in float64")
    try:
        try:
            function = _resetting(function, double=False)
        except CopyError:
            with NoWrites([]):
                return _compared(function, x.detach(), certain=False)
        return _compared(function, x.detach(), certain=False)
    except WritesError:
        return Difference("unknown", why="it keeps a state")
    except _UnlikeError as error:
        return Difference("unknown", why=str(error) or "its precision is another")
    except Exception as error:
        return Difference("unknown", why=f"it raises {type(error).__name__} when it is evaluated again")


def _resetting(function: Function, double: bool) -> Function:
    """A copy that starts from the same state at each evaluation."""
    copy = copied(function, double)

    def evaluated(x: Tensor) -> Tensor:
        copy.reset()
        return copy.field(x)

    return evaluated


class _UnlikeError(Exception):
    """Values that can't be compared; without a reason if another precision may do."""


def _compared(function: Function, x: Tensor, certain: bool) -> Difference:
    noise = torch.Generator("cpu").manual_seed(0)
    directions = torch.randn((2, *x.shape), generator=noise, dtype=torch.float64, device="cpu").to(x)
    size = x.abs().amax()
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)
    for moved in (_MOVED, 0.0):  # a field that is undefined beside its data is evaluated at these
        try:
            point = x + moved * size * directions[1]
            value = _value(function, point)
        except _UnlikeError:
            raise
        except Exception:
            if moved == 0.0:
                raise
            continue
        if value.isfinite().all():
            break
    if not torch.equal(_value(function, point).nan_to_num(), value.nan_to_num()):
        raise _UnlikeError("it keeps a state, or returns another value each time")
    weights = torch.randn(value.shape, generator=noise, dtype=torch.float64, device="cpu").to(value)
    known = _by_autograd(function, point, directions[0], weights)
    return _verdict(function, point, directions[0], weights, known, value, size, certain)


def _verdict(
    function: Function, x: Tensor, v: Tensor, w: Tensor, known: Tensor, value: Tensor, size: Tensor, certain: bool
) -> Difference:
    """Right if one step agrees with autograd; wrong if none does, and two of them agree with each other."""
    found: list[Tensor] = []
    eps = torch.finfo(x.dtype).eps
    rounding = eps * _per_sample(value.abs() * w.abs())
    # If terms of order one cancel in a value, it does not show their rounding: a smaller change is none.
    smallest = eps * size * _per_sample(w.abs()) / (max(_STEPS[x.dtype]) * size)
    agrees = _AGREES[x.dtype]
    for step in _STEPS[x.dtype]:
        h = step * size
        difference = _per_sample(w * (_value(function, x + h * v) - _value(function, x - h * v))) / (2 * h)
        usable = difference.isfinite() & known.isfinite()
        if not usable.any():
            continue
        d, a, slack = (torch.where(usable, it, 0.0) for it in (difference, known, rounding / h))
        scale = (d.abs() + a.abs()).sum()
        if (d - a).abs().sum() <= agrees * scale + 8 * slack.sum():
            return Difference("right", telling=bool(d.any()))
        if not d.any() and (a.abs() <= 8 * smallest).all():
            return Difference("unknown", why="its derivative is too small to be seen")
        for other in found:
            miss = (d - a).abs().sum()
            nothing = not bool(a.any())
            allowed = _CONSISTENT_WITH_NOTHING if nothing else _CONSISTENT
            if (d - torch.where(usable, other, 0.0)).abs().sum() <= allowed * miss:
                worst = (d - a).abs().argmax()
                return Difference(
                    "wrong",
                    certain or nothing,
                    missed=float(miss / scale.clamp_min(1e-300)),
                    difference=float(d[worst]),
                    autograd=float(a[worst]),
                )
        found.append(torch.where(usable, d, torch.inf))
    return Difference("unknown", why="its differences do not settle")


def _by_autograd(function: Function, x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    value = _value(function, z, graph=True)
    if not value.requires_grad:
        return x.new_zeros(len(x))
    (gradient,) = torch.autograd.grad(value, z, w, allow_unused=True)
    return x.new_zeros(len(x)) if gradient is None else _per_sample(gradient * v)


def _value(function: Function, x: Tensor, graph: bool = False) -> Tensor:
    """Evaluate with the same random numbers each time, outside of autocast, whose rounding would look like a difference."""
    with (
        seeded(0, [x.device] if x.is_cuda else []),
        torch.enable_grad(),  # because a field may ask whether grad is enabled
        torch.autocast(x.device.type, enabled=False),
    ):
        z = x.clone() if graph else x.clone().requires_grad_()
        value = function(z)
    if value.dtype != x.dtype:
        raise _UnlikeError
    return value if graph else value.detach()


def _per_sample(z: Tensor) -> Tensor:
    return z.reshape(len(z), -1).sum(dim=1)

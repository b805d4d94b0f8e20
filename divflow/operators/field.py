"""What a field g(t, x) is given and returns: checked, with the shapes that all else relies on."""

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from divflow.errors import FieldError

__all__ = [
    "AtTime",
    "Field",
    "accumulation_dtype",
    "as_time",
    "checked_state",
    "checked_value",
    "event_size",
    "flatten_event",
]

Field = Callable[[Tensor, Tensor], Tensor]
"""A callable of time and states `(k, *event)` that returns the states' shape."""


def event_size(x: Tensor) -> int:
    """D, the number of scalars in one event of x `(k, *event)`."""
    return math.prod(x.shape[1:])


def flatten_event(x: Tensor, batch_dims: int = 1) -> Tensor:
    """Return x with all its dimensions after the first `batch_dims` as one (a scalar event as one of size 1)."""
    return x.reshape(*x.shape[:batch_dims], math.prod(x.shape[batch_dims:]))


def checked_state(x: Tensor) -> Tensor:
    """Return x, refused unless it is a floating-point tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise FieldError(
            f"x must be a tensor of shape (k, *event), but is a {type(x).__name__}; use torch.as_tensor(x)"
        )
    if not x.is_floating_point():
        raise FieldError(
            f"x must have a floating dtype to be differentiated, but has {x.dtype}; convert it, for instance by x.float()"
        )
    if x.ndim == 0:
        raise FieldError("x must have a batch dimension, shape (k, *event), but is a scalar; use x.unsqueeze(0)")
    return x


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """Return t as a tensor of shape () or (k,): a number takes x's dtype and device."""
    if not isinstance(t, Tensor):
        if not isinstance(t, numbers.Real):
            raise FieldError(f"t must be a number or a tensor, but is a {type(t).__name__}")
        return x.new_full((), float(t))  # filled there, where a copy from here would make the host wait
    if t.shape not in ((), x.shape[:1]):
        raise FieldError(
            f"t must be a scalar () or one time a sample ({x.shape[0]},), but has shape {tuple(t.shape)}; "
            "use t.reshape(()) or t.expand(len(x))"
        )
    if t.ndim and t.device != x.device:
        raise FieldError(f"t is on {t.device} and x on {x.device}; move one of them, for instance t.to(x.device)")
    return t


def checked_value(value: Tensor, x: Tensor) -> Tensor:
    """Return the field's value in x's dtype, refused unless it has x's shape, dtype and device.

    Under autocast a field may return the autocast dtype; it is cast back, so that what is summed from
    it is summed in x's precision.
    """
    if not isinstance(value, Tensor):
        raise FieldError(
            f"the field returned a {type(value).__name__}, not a tensor; it must return one tensor of x's shape {tuple(x.shape)}"
        )
    if value.shape != x.shape:
        raise FieldError(
            f"the field returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; a divergence needs "
            "as many outputs as inputs: return a tensor of x's shape (reshape a flattened one back)"
        )
    if value.device != x.device:
        raise FieldError(f"the field returned a tensor on {value.device} for x on {x.device}; keep both on one device")
    if value.dtype != x.dtype:
        device = x.device.type
        if not (torch.is_autocast_enabled(device) and value.dtype == torch.get_autocast_dtype(device)):
            raise FieldError(
                f"the field returned {value.dtype} for x of {x.dtype}; convert x or the field's parameters, "
                f"for instance by module.to({x.dtype}), and give a complex field by its real and imaginary parts"
            )
        value = value.to(x.dtype)
    return value


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype a divergence is summed and returned in: x's, but float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


class AtTime:
    """A field at one time, a function of the state; what it does to t in place is not seen outside.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
    """

    def __init__(self, g: Field, t: Tensor) -> None:
        self.g, self.t = g, t

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What it is made of, for what is kept of it."""
        return self.g, self.t.ndim

    def __call__(self, x: Tensor) -> Tensor:
        """g(t, x)."""
        with torch.inference_mode(False):
            t = self.t.clone()
        return self.g(t, x)

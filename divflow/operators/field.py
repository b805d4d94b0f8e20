"""What a field g(t, x) receives and returns: checked, with the shapes that all else relies on."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from divflow.errors import DivflowError, FieldError
from divflow.operators.calling import misuse, wrong_field

__all__ = [
    "AtTime",
    "Field",
    "accumulation_dtype",
    "as_time",
    "called",
    "checked_field",
    "checked_state",
    "checked_value",
    "event_size",
    "flatten_event",
]

Field = Callable[[Tensor, Tensor], Tensor]
"""A callable of time and states `(k, *event)` that returns the states' shape."""


def event_size(x: Tensor) -> int:
    """Return D, the number of scalars in one event of x.

    Args:
        x: states `(k, *event)`.
    """
    return math.prod(x.shape[1:])


def flatten_event(x: Tensor, batch_dims: int = 1) -> Tensor:
    """Flatten all dimensions of x after the first `batch_dims` to one; a scalar event becomes one of size 1.

    Args:
        x: the tensor.
        batch_dims: how many dimensions stay.
    """
    return x.reshape(*x.shape[:batch_dims], math.prod(x.shape[batch_dims:]))


def checked_field(g: Any) -> Any:
    """Return g, or refuse what can be no field: a class, something that is not callable, or arguments in the other order.

    Args:
        g: what was received.
    """
    if why := wrong_field(g):
        raise FieldError(why)
    return g


def checked_state(x: Tensor) -> Tensor:
    """Return x, or refuse it unless it is a floating-point tensor with a batch dimension.

    Args:
        x: what was received.
    """
    if not isinstance(x, Tensor):
        raise FieldError(
            f"x must be a tensor of shape (k, *event), but is a {type(x).__name__}. Use torch.as_tensor(x)."
        )
    if not x.is_floating_point():
        raise FieldError(
            f"x must have a floating dtype to be differentiated, but has {x.dtype}. Convert it, for instance by x.float()."
        )
    if x.ndim == 0:
        raise FieldError("x must have a batch dimension, shape (k, *event), but is a scalar. Use x.unsqueeze(0).")
    return x


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """Return t as a tensor of shape () or (k,); a number takes x's dtype and device.

    Args:
        t: time.
        x: states `(k, *event)`.
    """
    if not isinstance(t, Tensor):
        if not isinstance(t, numbers.Real):
            raise FieldError(f"t must be a number or a tensor, but is a {type(t).__name__}")
        return x.new_full((), float(t))  # filled on the device, because the host would wait for a copy
    if t.shape not in ((), x.shape[:1]):
        raise FieldError(
            f"t must be a scalar () or one time per sample ({x.shape[0]},), but has shape {tuple(t.shape)}. "
            + (
                "Use t.reshape(())."
                if t.numel() == 1
                else "Use t.reshape(-1)."
                if t.numel() == len(x)
                else "Give as many times as samples."
            )
        )
    if t.ndim and t.device != x.device:
        raise FieldError(f"t is on {t.device} and x on {x.device}. Move one of them, for instance by t.to(x.device).")
    return t


def checked_value(value: Tensor, x: Tensor) -> Tensor:
    """Return the field's value in x's dtype, or refuse it unless it has x's shape, dtype and device.

    Under autocast a field may return the autocast dtype. It is cast back, so that sums of it have x's precision.

    Args:
        value: what the field returned.
        x: its states `(k, *event)`.
    """
    if not isinstance(value, Tensor):
        raise FieldError(
            f"the field returned a {type(value).__name__}, not a tensor. It must return one tensor of x's shape {tuple(x.shape)}."
        )
    if value.shape != x.shape:
        raise FieldError(
            f"the field returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}. A divergence needs as many "
            "outputs as inputs: return a tensor of x's shape, reshaped back if it was flattened."
        )
    if value.device != x.device:
        raise FieldError(f"the field returned a tensor on {value.device} for x on {x.device}. Keep both on one device.")
    if value.dtype != x.dtype:
        device = x.device.type
        if not (torch.is_autocast_enabled(device) and value.dtype == torch.get_autocast_dtype(device)):
            raise FieldError(
                f"the field returned {value.dtype} for x of {x.dtype}. Convert x or the field's parameters, for instance by "
                f"module.to({x.dtype}); pass a complex field as its real and imaginary parts."
            )
        value = value.to(x.dtype)
    return value


def called(g: Callable[..., Any], t: Tensor, x: Tensor, *context: Any) -> Any:
    """Evaluate g(t, x), or g(t, x, context), and say what to do where g can't be called like that.

    Args:
        g: the function or module.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        *context: the context, if there is one.

    Raises:
        FieldError: g takes other arguments, or another dtype. Errors of g itself are raised as they are.
    """
    try:
        return g(t, x, *context)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        if not isinstance(error, DivflowError) and (why := misuse(g, x, len(context), error)):
            raise FieldError(why) from error
        raise


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a divergence is summed and returned: x's, but at least float32.

    Args:
        x: states.
    """
    return torch.promote_types(x.dtype, torch.float32)


class AtTime:
    """A field at one time, as a function of the state; in-place changes of t inside it stay inside.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
    """

    def __init__(self, g: Field, t: Tensor) -> None:
        self.g, self.t = g, t

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What this function is made of, for plans to be kept."""
        return self.g, self.t.ndim

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate g(t, x)."""
        with torch.inference_mode(False):
            t = self.t.clone()
        return called(self.g, t, x)

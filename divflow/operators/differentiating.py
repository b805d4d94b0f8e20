"""Fields that differentiate in x themselves, such as the gradient of a potential, evaluated with grad enabled."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from divflow.operators.field import Field, called
from divflow.tape.graph import graph_of
from divflow.verification.kept import Plans

__all__ = ["differentiates", "evaluated", "note_differentiates"]

# Torch's message if a gradient is requested and no graph leads from x.
_REFUSED = "does not require grad"
_DIFFERENTIATING: Plans[bool] = Plans()


def evaluated(g: Field, t: Tensor, x: Tensor, call: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Evaluate g(t, x), also if g itself takes `torch.autograd.grad` in x and nothing else would build a graph from x.

    Such a field is recognised by torch's error, once, and is then evaluated with grad enabled at a copy of x that requires
    grad. The value has a graph only if it contains the caller's parameters, t or context and the caller has grad enabled.

    Args:
        g: the field, by which it is remembered.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        call: evaluates it; g itself if None.
    """
    call = functools.partial(called, g) if call is None else call
    differentiable = torch.is_grad_enabled()
    if (differentiable and x.requires_grad) or torch.compiler.is_compiling():
        return call(t, x)
    if not differentiates(g):
        try:
            return call(t, x)
        except RuntimeError as error:
            if _REFUSED not in str(error) or torch._C._functorch.peek_interpreter_stack() is not None:
                raise
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        value = call(t.clone(), point.clone())
    note_differentiates(g)
    if not isinstance(value, Tensor):
        return value
    others = (getattr(node, "variable", point) is not point for node in graph_of(value))
    return value if differentiable and any(others) else value.detach()


def differentiates(g: Field) -> bool:
    """Whether a field is known to differentiate in x.

    Args:
        g: the field.
    """
    return bool(_DIFFERENTIATING.get(g))


def note_differentiates(g: Field) -> None:
    """Remember that a field differentiates in x, for as long as it lives.

    Args:
        g: the field.
    """
    _DIFFERENTIATING.keep(True, g)

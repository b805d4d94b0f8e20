"""What operators take and return: parameters by their names, and complex values of real arguments."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from divflow.errors import FieldError
from divflow.operators.linearization import Linearization

__all__ = ["Parts", "check_parameters", "description", "plain"]


def check_parameters(f: object, parameters: object, inputs: Sequence[object]) -> None:
    """Refuse parameters that are not a dict of real tensors or not the module's own, and inputs that are not tensors.

    Args:
        f: the module or function.
        parameters: by name.
        inputs: of f.

    Raises:
        FieldError: with what was received.
    """
    named = parameters if isinstance(parameters, Mapping) else {}
    for value in (*inputs, *(named.values() or (None,))):
        if not isinstance(value, Tensor):
            raise FieldError(f"parameters must be a dict of tensors, and the inputs tensors, but one is {value!r}")
    for name, value in named.items():
        if not value.is_floating_point():
            raise FieldError(
                f"parameters must have a floating dtype to be differentiated, but {name!r} has {value.dtype}. Leave it out by "
                "`parameters`, or pass a complex one as its real and imaginary parts."
            )
    if isinstance(f, nn.Module):
        known = [name for name, _ in (*f.named_parameters(remove_duplicate=False), *f.named_buffers())]
        if unknown := sorted(set(named) - set(known)):
            raise FieldError(f"{type(f).__name__} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")


class Parts:
    """A check of a function's value that passes a complex one on as two real numbers, along an additional last dimension.

    Autograd computes derivatives of real numbers in real ones: those of the two parts are the two parts of a complex
    derivative.

    Args:
        check: of the value and x, such as `linearize` takes; returns the value.
    """

    def __init__(self, check: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._check, self._complex = check, False

    def __call__(self, value: Tensor, x: Tensor) -> Tensor:
        """Return the checked value, or its parts."""
        value = self._check(value, x)
        self._complex = value.is_complex()
        return torch.stack([value.real, value.imag], dim=-1) if self._complex else value

    def slope(self, at: Linearization, x: Tensor) -> Tensor:
        """The derivative in x of the sum of the values."""
        if not self._complex:
            return at.pullback(x.new_ones(1, *at.value.shape))[0]
        parts = torch.eye(2, dtype=x.dtype, device=x.device).view(2, *[1] * (at.value.ndim - 1), 2)
        return torch.complex(*at.pullback(parts.expand(2, *at.value.shape)))

    def joined(self, derivatives: Tensor, dim: int) -> Tensor:
        """Join the derivatives of the parts, numbered by a dimension, as complex ones."""
        return torch.complex(*derivatives.unbind(dim)) if self._complex else derivatives


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor that can enter a graph, unlike those made in inference mode.

    Args:
        tensor: any.
    """
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def description(value: object) -> str:
    """Describe a value for messages.

    Args:
        value: any.
    """
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

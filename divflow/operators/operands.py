"""What operators take and return: parameters by their names, and complex values of real arguments."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from divflow.errors import FieldError
from divflow.operators.linearization import Linearization

__all__ = ["Parts", "check_parameters", "description", "plain"]


def check_parameters(f: object, parameters: object, inputs: Sequence[object]) -> None:
    """Refuse parameters that are no dict of real tensors, or none of a module's, and inputs that are no tensors.

    Raises:
        FieldError: naming them.
    """
    named = parameters if isinstance(parameters, Mapping) else {}
    for value in (*inputs, *(named.values() or (None,))):
        if not isinstance(value, Tensor):
            raise FieldError(f"parameters must be a dict of tensors, and the inputs tensors, but one is {value!r}")
    for name, value in named.items():
        if not value.is_floating_point():
            raise FieldError(
                f"parameters must be of a floating dtype to be differentiated, but {name!r} is of {value.dtype}; leave it out by "
                "`parameters`, or give a complex one by its real and imaginary parts"
            )
    if isinstance(f, nn.Module):
        known = [name for name, _ in (*f.named_parameters(remove_duplicate=False), *f.named_buffers())]
        if unknown := sorted(set(named) - set(known)):
            raise FieldError(f"{type(f).__name__} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")


class Parts:
    """A check of a function's value that lets complex ones pass as two real numbers, along one more dimension at the end.

    Autograd knows derivatives of real numbers in real ones: those of the two parts are the two parts of a complex derivative.

    Args:
        check: of the value and x, such as `linearize` takes; returns the value.
    """

    def __init__(self, check: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._check, self._complex = check, False

    def __call__(self, value: Tensor, x: Tensor) -> Tensor:
        """The checked value, or its parts."""
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
        """Derivatives of the parts, which a dimension numbers, as complex ones."""
        return torch.complex(*derivatives.unbind(dim)) if self._complex else derivatives


def plain(tensor: Tensor) -> Tensor:
    """A tensor that can enter a graph, which those made in inference mode can't."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def description(value: object) -> str:
    """What a value is, for messages."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

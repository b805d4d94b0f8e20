"""The error of a step as one number, in units of what the tolerances allow."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["of_parts", "worst_sample"]


@torch.no_grad()
def worst_sample(errors: Tensor | Sequence[Tensor]) -> Tensor:
    """Compute the error of a step in units of what is allowed: the root mean square of the sample with the largest.

    torchdiffeq's own norm is the mean over the batch, which hides one sample whose error is a hundred times too large: the
    result of a sample would depend on the others in its batch.

    Args:
        errors: of a state `(k, *event)`, or of each part of one.
    """
    if isinstance(errors, Tensor):
        rows = errors.reshape(len(errors) if errors.ndim else 1, -1)
        return rows.abs().square().mean(dim=1).max().sqrt()
    return torch.stack([worst_sample(part) for part in errors if part.numel()]).max()


def of_parts(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor | Sequence[Tensor]], Tensor]:
    """Extend a norm of one tensor to a state of several parts: the largest of them.

    `Augmented` solves for the state and the log-determinant together.

    Args:
        norm: of one tensor.
    """

    def largest(errors: Tensor | Sequence[Tensor]) -> Tensor:
        parts = [errors] if isinstance(errors, Tensor) else [part for part in errors if part.numel()]
        found = [torch.as_tensor(norm(part), dtype=part.dtype, device=part.device) for part in parts]
        for value in found:
            if value.numel() != 1:
                raise ValueError(f"norm must return one number, but returned a tensor of shape {tuple(value.shape)}")
        return torch.stack([value.reshape(()) for value in found]).max()

    return largest

"""When two numbers of one thing agree, in the precision that they were computed in."""

import torch
from torch import Tensor

from divflow.tape import NoRule
from divflow.tape.verify import TOLERANCES

__all__ = ["require_equal", "tolerance"]

# How many units in the last place may be lost where the terms of a derivative cancel.
_ROUNDINGS = 32


def tolerance(dtype: torch.dtype) -> float:
    """Relative differences that are rounding."""
    return TOLERANCES.get(dtype, 0.05)


def require_equal(known: Tensor, true: Tensor, dtype: torch.dtype, reason: str, bound: Tensor | None = None) -> None:
    """That the sums over the entries of every sample agree, in a precision.

    Args:
        known: `(k, n)`.
        true: what it should be.
        dtype: that they were computed in.
        reason: to give where they don't.
        bound: what the entries would be if nothing in them cancelled; its roundoff is allowed, where a softmax is saturated.

    Raises:
        NoRule: they don't.
    """
    scale = torch.linalg.vector_norm(known, dim=1) + torch.linalg.vector_norm(true, dim=1)
    allowed = tolerance(dtype) * scale
    if bound is not None:
        allowed = allowed + _ROUNDINGS * torch.finfo(dtype).eps * bound.sum(dim=1)
    if not ((known.sum(dim=1) - true.sum(dim=1)).abs() <= allowed).all():
        raise NoRule(reason)

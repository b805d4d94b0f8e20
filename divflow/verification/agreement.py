"""Whether two computations of one number agree, in the precision of their computation."""

import torch
from torch import Tensor

from divflow.tape import NoRule
from divflow.tape.verify import TOLERANCES

__all__ = ["require_equal", "tolerance"]

# How many units in the last place may be lost if the terms of a derivative cancel.
_ROUNDINGS = 32


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that counts as rounding.

    Args:
        dtype: of the computation.
    """
    return TOLERANCES.get(dtype, 0.05)


def require_equal(known: Tensor, true: Tensor, dtype: torch.dtype, reason: str, bound: Tensor | None = None) -> None:
    """Require that the sums over the entries of every sample agree, in a precision.

    Args:
        known: `(k, n)`.
        true: the expected values.
        dtype: in which they were computed.
        reason: of the exception.
        bound: the entries without any cancellation; its roundoff is allowed, as of a saturated softmax.

    Raises:
        NoRule: they don't.
    """
    scale = torch.linalg.vector_norm(known, dim=1) + torch.linalg.vector_norm(true, dim=1)
    allowed = tolerance(dtype) * scale
    if bound is not None:
        allowed = allowed + _ROUNDINGS * torch.finfo(dtype).eps * bound.sum(dim=1)
    if not ((known.sum(dim=1) - true.sum(dim=1)).abs() <= allowed).all():
        raise NoRule(reason)

"""Fields that are new at each call, such as closures over a batch of conditions, so that nothing is kept of them."""

import warnings

from divflow.errors import FieldWarning
from divflow.verification.kept import Plans, captured, kin

__all__ = ["note_new"]

# So many new fields of one code, over tensors with one row per sample, come from a loop.
_SEVERAL = 8


class _Count:
    """How many fields of one code were new."""

    def __init__(self) -> None:
        self.number = 0


_COUNTS: Plans[_Count] = Plans()


def note_new(g: object, batch: int) -> None:
    """Note a field of which nothing is known yet.

    Args:
        g: the field.
        batch: the number of samples.

    Warns:
        FieldWarning: once per code, if it is planned anew at each call because it is a closure over conditions of the batch.
    """
    given = [tuple(tensor.shape) for tensor in captured(g) if tensor.ndim and len(tensor) == batch > 1]
    if not given:
        return
    count = _COUNTS.of(_Count, kin(g))
    count.number += 1
    if count.number == _SEVERAL:
        warnings.warn(
            f"the field is a function made anew for each batch, over a tensor with one row for each of its {batch} samples, {given[0]}: it "
            "is planned anew at each call. Pass the tensor as the context, for which the plan is kept: "
            "divergence(g, t, x, context=c), with g(t, x, context).",
            FieldWarning,
            stacklevel=2,
        )

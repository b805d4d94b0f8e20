"""A context by the names of its columns, such as {"age": 41.0}."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from divflow.errors import FieldError

__all__ = ["from_columns", "in_order"]


def from_columns(given: Mapping[Any, Any], columns: Sequence[str], count: int, like: Tensor) -> Tensor:
    """Make the context of `count` samples, `(count, columns)`, from its columns by name; gradients reach tensors among them.

    Args:
        given: for each column a number for all samples, or one number per sample, `(count,)`.
        columns: names of the columns, in the order of the context.
        count: of the samples.
        like: a tensor with the dtype and device of the context.

    Raises:
        FieldError: the names differ from the columns, or a value is neither a number nor one number per sample.
    """
    found = []
    for name, value in zip(columns, in_order(given, columns), strict=True):
        try:
            column = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FieldError(
                f"the context's {name} must be a number or ({count},) of them, but is {value!r}"
            ) from error
        if column.shape not in ((), (count,)):
            raise FieldError(
                f"the context's {name} must be a number for all samples, or one number per sample, ({count},), but has shape "
                f"{tuple(column.shape)}. Use its column alone, such as context[:, 0]."
            )
        found.append(column.expand(count))
    return torch.stack(found, dim=1)


def in_order(given: Mapping[Any, Any], columns: Sequence[str]) -> list[Any]:
    """Return the values in the order of the columns.

    Args:
        given: a value for each column, by name.
        columns: names of the columns.

    Raises:
        FieldError: the names are not those of the columns.
    """
    by_name = {str(name): value for name, value in given.items()}
    if by_name.keys() != set(columns):
        raise FieldError(
            f"the context names {', '.join(by_name) or 'nothing'}, but the columns of the context are {', '.join(columns)}. Give a value "
            "for each of these names, and no others."
        )
    return [by_name[name] for name in columns]

"""What a function is given beside time and state: a context, which is a tensor or any tree of tensors, one row a sample.

Trees are those of `torch.utils._pytree`: dicts, tuples, named tuples and lists, within one another, and what is registered there. Leaves
are tensors of any dtype, such as labels, masks and features; None stands for a part that is not there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from divflow.errors import FieldError

__all__ = [
    "Context",
    "cast_context",
    "check_context",
    "context_rows",
    "has_rows",
    "joined_contexts",
    "mapped",
    "named_tensors",
    "repeated",
    "structure",
]

Context = Any
"""A tensor `(k, ...)`, or a tree of tensors, each of one row a sample."""


def mapped(function: Callable[[Tensor], Tensor], context: Context) -> Context:
    """The tree with a function applied to each of its tensors."""
    if isinstance(context, Tensor):
        return function(context)
    return None if context is None else pytree.tree_map_only(Tensor, function, context)


def named_tensors(context: Context, name: str = "the context") -> list[tuple[str, Tensor]]:
    """The tensors of a tree by their paths, such as `the context['labels']`.

    Raises:
        FieldError: a leaf that is no tensor, with its path.
    """
    if isinstance(context, Tensor):
        return [(name, context)]
    found = []
    for path, leaf in pytree.tree_flatten_with_path(context)[0]:
        place = f"{name}{pytree.keystr(path)}"
        if isinstance(leaf, Tensor):
            found.append((place, leaf))
        elif leaf is not None:
            raise FieldError(
                f"a context is a tensor or a tree of tensors (dict, tuple, list), but {place} is {repr(leaf)[:80]}; use "
                "torch.as_tensor, or let the function know by itself what is the same for all samples"
            )
    return found


def check_context(context: Context | None, x: Tensor) -> None:
    """Refuse a context that is no tensor, or tree of tensors, of one row a sample.

    Raises:
        FieldError: with the path and the shape of the first leaf that is not.
    """
    for place, leaf in named_tensors(context):
        if leaf.ndim == 0 or len(leaf) != len(x):
            raise FieldError(
                f"{place} needs one row a sample, ({len(x)}, ...), but has shape {tuple(leaf.shape)}; "
                f"repeat a single one by {place.removeprefix('the ')}.expand({len(x)}, ...)"
            )


def has_rows(context: Context, count: int) -> bool:
    """Whether each tensor has `count` rows, so that the rows of a context are those of samples.

    Raises:
        FieldError: a leaf that is no tensor.
    """
    return all(leaf.ndim > 0 and len(leaf) == count for _, leaf in named_tensors(context))


def context_rows(context: Context, rows: slice | list[int] | Tensor) -> Context:
    """Some rows of each tensor."""
    return mapped(lambda leaf: leaf[rows], context)


def repeated(context: Context, times: int) -> Context:
    """`times` copies of the rows, one after another."""
    return mapped(lambda leaf: leaf.repeat(times, *[1] * (leaf.ndim - 1)), context)


def cast_context(context: Context, dtype: torch.dtype) -> Context:
    """The tree with its real floating-point tensors in a dtype: labels and masks stay what they are."""
    return mapped(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, context)


def joined_contexts(contexts: Iterable[Context]) -> Context:
    """The rows of several contexts of one structure, one after another; None of none."""
    first, *others = [context for context in contexts if context is not None] or [None]
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), first, *others)


def structure(context: Context) -> str:
    """What plans depend on of a context: its tree, and the dtypes and shapes of a row, not the number of rows nor any value."""
    if isinstance(context, Tensor | None):
        return "None" if context is None else f"{context.dtype}{tuple(context.shape[1:])}"
    leaves, tree = pytree.tree_flatten(context)
    return f"{tree}: {', '.join(map(structure, leaves))}"

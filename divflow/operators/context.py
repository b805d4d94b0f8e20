"""The context of a function beside time and state: a tensor or any tree of tensors, usually with one row per sample.

Trees are those of `torch.utils._pytree`: nested dicts, tuples, named tuples and lists, and the types registered there.
Leaves are tensors of any dtype, such as labels, masks and features. None stands for a missing part.
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
"""A tensor `(k, ...)`, or a tree of tensors, each with one row per sample."""


def mapped(function: Callable[[Tensor], Tensor], context: Context) -> Context:
    """Apply a function to each tensor of a tree.

    Args:
        function: of one tensor.
        context: the tree.
    """
    if isinstance(context, Tensor):
        return function(context)
    return None if context is None else pytree.tree_map_only(Tensor, function, context)


def named_tensors(context: Context, name: str = "the context") -> list[tuple[str, Tensor]]:
    """Return the tensors of a tree with their paths, such as `the context['labels']`.

    Args:
        context: the tree.
        name: of the root, for the paths.

    Raises:
        FieldError: a leaf that is not a tensor, with its path.
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
                f"a context must be a tensor or a tree of tensors (dict, tuple, list), but {place} is {repr(leaf)[:80]}. Use "
                "torch.as_tensor, or bind what is the same for all samples to the function itself."
            )
    return found


def check_context(context: Context | None, x: Tensor) -> None:
    """Refuse a context that is not a tensor, or tree of tensors, with one row per sample.

    Args:
        context: the tree, or None.
        x: states `(k, *event)`.

    Raises:
        FieldError: with the path and the shape of the first leaf that is not.
    """
    for place, leaf in named_tensors(context):
        if leaf.ndim == 0 or len(leaf) != len(x):
            raise FieldError(
                f"{place} needs one row per sample, ({len(x)}, ...), but has shape {tuple(leaf.shape)}. "
                f"Repeat a single row by {place.removeprefix('the ')}.expand({len(x)}, ...)."
            )


def has_rows(context: Context, count: int) -> bool:
    """Whether each tensor has `count` rows, so that the rows of a context belong to samples.

    Args:
        context: the tree.
        count: of the samples.

    Raises:
        FieldError: a leaf that is not a tensor.
    """
    return all(leaf.ndim > 0 and len(leaf) == count for _, leaf in named_tensors(context))


def context_rows(context: Context, rows: slice | list[int] | Tensor) -> Context:
    """Select rows of each tensor.

    Args:
        context: the tree.
        rows: an index of the first dimension.
    """
    return mapped(lambda leaf: leaf[rows], context)


def repeated(context: Context, times: int) -> Context:
    """Repeat the rows, one copy after another.

    Args:
        context: the tree.
        times: how many copies.
    """
    return mapped(lambda leaf: leaf.repeat(times, *[1] * (leaf.ndim - 1)), context)


def cast_context(context: Context, dtype: torch.dtype) -> Context:
    """Convert the real floating-point tensors of a tree to a dtype; labels and masks stay as they are.

    Args:
        context: the tree.
        dtype: the new one.
    """
    return mapped(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, context)


def joined_contexts(contexts: Iterable[Context]) -> Context:
    """Concatenate the rows of several contexts of one structure; None if there are none.

    Args:
        contexts: the trees.
    """
    first, *others = [context for context in contexts if context is not None] or [None]
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), first, *others)


def structure(context: Context) -> str:
    """Describe what plans depend on: the tree, and the dtype and shape of a row, not the number of rows nor any value.

    Args:
        context: the tree.
    """
    if isinstance(context, Tensor | None):
        return "None" if context is None else f"{context.dtype}{tuple(context.shape[1:])}"
    leaves, tree = pytree.tree_flatten(context)
    return f"{tree}: {', '.join(map(structure, leaves))}"

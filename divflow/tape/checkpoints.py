"""Tensors that are saved for a backward pass while a function is followed within a checkpoint."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from divflow.tape.operation import version

__all__ = ["CheckpointedError", "require_nothing_saved", "saved_tensors_hook", "saved_whole"]


def saved_tensors_hook() -> object:
    """What packs the tensors that are saved for a backward pass: within a checkpoint the hook of that; None for none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


class CheckpointedError(Exception):
    """A function within a checkpoint can't be followed; caught by who follows."""


def require_nothing_saved(hook: object) -> None:
    """That a checkpoint has been given no tensors, as by a function that torch functions do not show.

    It gives them out by their number in its second computation, which also counts those that were saved whole in the
    first: what such a function gets back would be another tensor.

    Raises:
        CheckpointedError: it has.
    """
    for cell in getattr(hook, "__closure__", None) or ():
        if getattr(cell.cell_contents, "weak_holders", None):
            raise CheckpointedError("a checkpoint holds a function that is hidden from torch functions")


@contextlib.contextmanager
def saved_whole() -> Iterator[None]:
    """Within it tensors are saved as they are, out of a checkpoint's sight.

    A checkpoint counts what is saved in its forward pass, and again when it is computed once more, where no one follows.
    """
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), version(tensor)  # detached, since an operation's own result would keep itself alive


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, number = packed
    if version(tensor) != number:
        raise RuntimeError("a tensor that the backward pass needs was changed in place")
    return tensor

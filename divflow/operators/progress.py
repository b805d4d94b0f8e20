"""The progress of a long evaluation, reported to watchers."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

__all__ = ["report", "watched"]

Watcher = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and the total."""

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Report every finished part of an evaluation to a watcher; what the watcher raises ends the evaluation.

    Args:
        watcher: called with what is counted, how many are done, and the total.
    """
    _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:  # by identity, because watchers need not end in reverse order
        _WATCHERS.set(tuple(other for other in _WATCHERS.get() if other is not watcher))


def report(what: str, done: int, total: int) -> None:
    """Report to all watchers of this thread.

    Args:
        what: is counted.
        done: how many are done.
        total: how many there are.
    """
    if torch.compiler.is_compiling():
        return
    for watcher in _WATCHERS.get():
        watcher(what, done, total)

"""Progress of a long evaluation, reported to those who watch it."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

__all__ = ["report", "watched"]

Watcher = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and how many there are."""

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Report every finished part of an evaluation to the watcher, within this context; what the watcher raises ends the evaluation."""
    _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:  # by name, since those who watch need not end in the reverse order
        _WATCHERS.set(tuple(other for other in _WATCHERS.get() if other is not watcher))


def report(what: str, done: int, total: int) -> None:
    """Report to all watchers of this thread."""
    if torch.compiler.is_compiling():
        return
    for watcher in _WATCHERS.get():
        watcher(what, done, total)

"""How far a long evaluation is, told to whoever watches it."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

__all__ = ["tell", "watched"]

Watcher = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and how many there are."""

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within it the watcher is told of every part of an evaluation that is done; what it raises ends the evaluation."""
    _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:  # by name, since those who watch need not end in the reverse order
        _WATCHERS.set(tuple(other for other in _WATCHERS.get() if other is not watcher))


def tell(what: str, done: int, total: int) -> None:
    """Tell all watchers of this thread."""
    if torch.compiler.is_compiling():
        return
    for watcher in _WATCHERS.get():
        watcher(what, done, total)

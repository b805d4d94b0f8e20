"""What is kept of a user's functions for as long as they live: by identity, however often a lambda is made anew."""

import contextlib
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from divflow.tape.cache import Cache

__all__ = ["Plans", "captured", "contents", "kin", "referred"]

Kept = TypeVar("Kept")


class Plans(Generic[Kept]):
    """Values kept for fields, by their identity and some conditions; fields are held weakly.

    Args:
        size: how many are kept; the least recent is dropped first.
    """

    def __init__(self, size: int = 256) -> None:
        self._kept: Cache[tuple[list[weakref.ref], Kept]] = Cache(size)

    def get(self, g: object, *conditions: Hashable) -> Kept | None:
        """Return what is kept of this field, or None."""
        if not len(self._kept):  # finding an identity takes time
            return None
        parts, _ = _identity(g)
        references, kept = self._kept.get((parts, conditions)) or ((), None)
        return None if any(reference() is None for reference in references) else kept

    def keep(self, kept: Kept, g: object, *conditions: Hashable) -> None:
        """Keep something of this field, for as long as it lives."""
        parts, objects = _identity(g)
        key = parts, conditions
        try:
            references = [weakref.ref(item, lambda _: self._kept.forget(key)) for item in objects]
        except TypeError:  # without a weak reference its identity could later be that of another object
            return
        self._kept.keep(key, (references, kept))

    def of(self, make: Callable[[], Kept], g: object, *conditions: Hashable) -> Kept:
        """Return what is kept of this field; if nothing is, make it and keep it."""
        kept = self.get(g, *conditions)
        if kept is None:
            kept = make()
            self.keep(kept, g, *conditions)
        return kept


def _identity(g: object, depth: int = 0) -> tuple[Hashable, list[object]]:
    """Identify a field: a hashable, in which objects count by identity, and these objects.

    Two functions of the same code over the same objects are one field, such as a lambda made in each training step. An
    object that is made anew for each call names what it is made of by a property `divflow_identity`, a tuple.
    """
    if isinstance(g, (int, float, str, bool, bytes, type(None))):
        return (type(g), g), []
    if depth < 8:
        if isinstance(g, types.FunctionType):
            parts = [
                g.__code__,
                g.__defaults__ or (),
                tuple((g.__kwdefaults__ or {}).items()),
                *contents(g),
                *referred(g),
            ]
            return _joined(g.__code__, [g.__code__], parts[1:], depth)
        if isinstance(g, types.MethodType):
            return _joined("method", [], [g.__func__, g.__self__], depth)
        if isinstance(g, functools.partial):
            return _joined("partial", [], [g.func, g.args, tuple(g.keywords.items())], depth)
        if isinstance(g, tuple):
            return _joined("tuple", [], list(g), depth)
        if hasattr(type(g), "divflow_identity"):
            return _joined(type(g), [], list(cast(Any, g).divflow_identity), depth)
        if isinstance(g, nn.Module):
            return (id(g), g.training), [g]
    return id(g), [g]


def _joined(tag: object, own: list[object], parts: list[object], depth: int) -> tuple[Hashable, list[object]]:
    identities = [_identity(part, depth + 1) for part in parts]
    return (tag, *(identity for identity, _ in identities)), own + [
        item for _, objects in identities for item in objects
    ]


def contents(function: types.FunctionType) -> list[object]:
    """List what a function's closure holds, without variables that have no value yet.

    Args:
        function: the function.
    """
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def referred(function: types.FunctionType) -> list[object]:
    """List the networks that a function uses as globals, directly or by functions of its module, and the codes of those.

    Args:
        function: the function.
    """
    found: list[object] = []
    functions, seen = [function], {function.__code__}
    while functions:
        own = functions.pop()
        for name in _names(own.__code__):
            value = own.__globals__.get(name)
            if isinstance(value, nn.Module):
                found.append(value)
            elif (
                isinstance(value, types.FunctionType)
                and value.__module__ == function.__module__
                and value.__code__ not in seen
            ):
                seen.add(value.__code__)
                found.append(value.__code__)
                functions.append(value)
    return found


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a function, or one inside it, may use, in a fixed order."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return (*code.co_names, *itertools.chain.from_iterable(map(_names, inner)))


def captured(g: object, depth: int = 0) -> list[Tensor]:
    """List the tensors in a function's closure, and in those of the functions there.

    Args:
        g: the function.
        depth: of the search so far.
    """
    if isinstance(g, Tensor):
        return [g]
    if depth < 8 and isinstance(g, types.FunctionType):
        parts: list[object] = [*contents(g), *(g.__defaults__ or ())]
    elif depth < 8 and isinstance(g, functools.partial):
        parts = [g.func, *g.args, *g.keywords.values()]
    elif depth < 8 and isinstance(g, tuple | list | dict):
        parts = list(g.values() if isinstance(g, dict) else g)
    else:
        return []
    return [tensor for part in parts for tensor in captured(part, depth + 1)]


def kin(g: object, depth: int = 0) -> object:
    """Identify a field up to the tensors in its closure, so that functions of the same code at other calls are equal.

    A lambda that is made in each step over a new tensor is another field each time, but has the same code.

    Args:
        g: the function.
        depth: of the search so far.
    """
    if isinstance(g, types.FunctionType) and depth < 8:
        return (g.__code__, *(kin(item, depth + 1) for item in (*contents(g), *(g.__defaults__ or ()), *referred(g))))
    if isinstance(g, types.MethodType):
        return g.__func__.__code__ if isinstance(g.__func__, types.FunctionType) else g, kin(g.__self__, depth + 1)
    if isinstance(g, functools.partial) and depth < 8:
        return (kin(g.func, depth + 1), *(kin(item, depth + 1) for item in (*g.args, *g.keywords.values())))
    if hasattr(type(g), "divflow_identity") and depth < 8:
        return (type(g), *(kin(item, depth + 1) for item in cast(Any, g).divflow_identity))
    if isinstance(g, nn.Module) or (callable(g) and not isinstance(g, Tensor)):
        return g
    return type(g)

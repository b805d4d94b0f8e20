"""How an exact divergence is computed: the choice, and its memory for as long as the field lives."""

import contextlib
import functools
import types
import weakref
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from divflow.divergence.field import Field
from divflow.divergence.recent import Recent

__all__ = ["Plan", "Plans", "circumstances", "contents"]

Kept = TypeVar("Kept")


class Plan(NamedTuple):
    """How an exact divergence is computed.

    Attributes:
        method: "own", "layered", "colored", "reverse" or "forward".
        why: the reason.
        products: products with the Jacobian, over the whole batch; none where its trace has a closed form.
        chunk_size: how many of them are taken in one pass.
        cost_in_forward_passes: estimated cost of value and divergence, relative to the value alone.
        cost_in_probes: the same, relative to value and one vector-Jacobian product.
        memory: estimated bytes beyond those of the value, without a graph.
    """

    method: str
    why: str
    products: int
    chunk_size: int
    cost_in_forward_passes: float
    cost_in_probes: float
    memory: int


class Plans(Generic[Kept]):
    """What is kept of fields, by their identity and some circumstances; fields are held weakly.

    Args:
        size: how many are kept, the least recent forgotten first.
    """

    def __init__(self, size: int = 256) -> None:
        self._kept: Recent[tuple[list[weakref.ref], Kept]] = Recent(size)

    def get(self, g: Field, *circumstances: Hashable) -> Kept | None:
        """What is kept of this field, or None."""
        parts, _ = _identity(g)
        references, kept = self._kept.get((parts, circumstances)) or ((), None)
        return None if any(reference() is None for reference in references) else kept

    def keep(self, kept: Kept, g: Field, *circumstances: Hashable) -> None:
        """Keep something of this field, for as long as it lives."""
        parts, objects = _identity(g)
        key = parts, circumstances
        try:
            references = [weakref.ref(item, lambda _: self._kept.forget(key)) for item in objects]
        except TypeError:  # something that can't be referenced weakly: its identity could be another's tomorrow
            return
        self._kept.keep(key, (references, kept))


def _identity(g: object, depth: int = 0) -> tuple[Hashable, list[object]]:
    """What tells a field from another: a hashable, in which objects count by identity, and these objects.

    Two functions of the same code over the same objects are one field, such as a lambda made in each training step;
    a module that is made anew for each call tells by a property `divflow_identity`, a tuple, what it is made of.
    """
    if isinstance(g, (int, float, str, bool, bytes, type(None))):
        return (type(g), g), []
    if depth < 8:
        if isinstance(g, types.FunctionType):
            parts = [g.__code__, g.__defaults__ or (), tuple((g.__kwdefaults__ or {}).items()), *contents(g)]
            return _joined(g.__code__, [g.__code__], parts[1:], depth)
        if isinstance(g, types.MethodType):
            return _joined("method", [], [g.__func__, g.__self__], depth)
        if isinstance(g, functools.partial):
            return _joined("partial", [], [g.func, g.args, tuple(g.keywords.items())], depth)
        if isinstance(g, tuple):
            return _joined("tuple", [], list(g), depth)
        if isinstance(g, nn.Module):
            if hasattr(type(g), "divflow_identity"):
                return _joined(type(g), [], list(cast(tuple[object, ...], g.divflow_identity)), depth)
            return (id(g), g.training), [g]
    return id(g), [g]


def _joined(tag: object, own: list[object], parts: list[object], depth: int) -> tuple[Hashable, list[object]]:
    identities = [_identity(part, depth + 1) for part in parts]
    return (tag, *(identity for identity, _ in identities)), own + [
        item for _, objects in identities for item in objects
    ]


def contents(function: types.FunctionType) -> list[object]:
    """What a function's closure holds: of variables that have a value yet."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def circumstances(t: Tensor, x: Tensor) -> tuple[Hashable, ...]:
    """What a plan depends on beside the field."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return t.ndim, tuple(x.shape), x.dtype, x.device, torch.is_grad_enabled(), autocast

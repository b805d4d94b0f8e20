"""How an exact divergence is computed: the choice, and its memory for as long as the field lives."""

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor, nn

from divflow.divergence.field import Field

__all__ = ["Plan", "Plans", "circumstances", "state_of"]


class Plan(NamedTuple):
    """How an exact divergence is computed.

    Attributes:
        method: "layered", "colored", "reverse" or "forward".
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


class Plans:
    """Plans by field, event shape and the like, the least recently used forgotten first; fields are held weakly."""

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._plans: OrderedDict[Hashable, tuple[list[weakref.ref], Any]] = OrderedDict()

    def get(self, g: Field, *circumstances: Hashable) -> Any:
        """The plan kept for this field, or None."""
        parts, _ = _structure(g)
        held, plan = self._plans.get((parts, circumstances), ((), None))
        return None if any(reference() is None for reference in held) else plan

    def keep(self, plan: Any, g: Field, *circumstances: Hashable) -> None:
        """Keep a plan for this field."""
        parts, objects = _structure(g)
        key = parts, circumstances
        try:
            held = [weakref.ref(item, lambda _: self._plans.pop(key, None)) for item in objects]
        except TypeError:  # something that can't be referenced weakly: its identity could be another's tomorrow
            return
        self._plans[key] = held, plan
        self._plans.move_to_end(key)
        while len(self._plans) > self._size:
            self._plans.popitem(last=False)


def _structure(g: object, depth: int = 0) -> tuple[Hashable, list[object]]:
    """What tells a field from another: a hashable, in which objects count by identity, and these objects.

    Two functions of the same code over the same objects are one field, such as a lambda made in each training step;
    a module that is made anew for each call tells by a property `divflow_identity`, a tuple, what it is made of.
    """
    if isinstance(g, (int, float, str, bool, bytes, type(None))):
        return (type(g), g), []
    if depth < 8:
        if isinstance(g, types.FunctionType):
            cells = [cell.cell_contents for cell in g.__closure__ or () if _is_set(cell)]
            parts = [g.__code__, g.__defaults__ or (), tuple((g.__kwdefaults__ or {}).items()), *cells]
            return _joined(g.__code__, [g.__code__], parts[1:], depth)
        if isinstance(g, types.MethodType):
            return _joined("method", [], [g.__func__, g.__self__], depth)
        if isinstance(g, functools.partial):
            return _joined("partial", [], [g.func, g.args, tuple(g.keywords.items())], depth)
        if isinstance(g, tuple):
            return _joined("tuple", [], list(g), depth)
        if isinstance(g, nn.Module):
            if hasattr(type(g), "divflow_identity"):
                return _joined(type(g), [], list(g.divflow_identity), depth)
            return (id(g), g.training), [g]
    return id(g), [g]


def _joined(tag: Hashable, own: list[object], parts: list[object], depth: int) -> tuple[Hashable, list[object]]:
    structures = [_structure(part, depth + 1) for part in parts]
    return (tag, *(structure for structure, _ in structures)), own + [
        item for _, objects in structures for item in objects
    ]


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where the variable has no value yet
    except ValueError:
        return False
    return True


def state_of(g: object, depth: int = 0) -> Hashable:
    """The identities and versions of all tensors that the modules in a field hold: another after they are changed."""
    if isinstance(g, nn.Module):
        held = [item for module in g.modules() for item in (*module._buffers.values(), *vars(module).values())]
        return tuple(
            (id(item), 0 if item.is_inference() else item._version) for item in held if isinstance(item, Tensor)
        )
    parts: list[object] = []
    if depth < 8:
        if isinstance(g, types.FunctionType):
            parts = [cell.cell_contents for cell in g.__closure__ or () if _is_set(cell)]
        elif isinstance(g, types.MethodType):
            parts = [g.__self__]
        elif isinstance(g, functools.partial):
            parts = [g.func, *g.args, *g.keywords.values()]
        elif isinstance(g, tuple | list):
            parts = list(g)
        elif isinstance(g, dict):
            parts = list(g.values())
        elif callable(g) and hasattr(g, "__dict__") and not isinstance(g, type):
            parts = list(vars(g).values())
    return tuple(state for part in parts if (state := state_of(part, depth + 1)))


def circumstances(t: Tensor, x: Tensor) -> Hashable:
    """What a plan depends on beside the field."""
    return t.ndim, tuple(x.shape), x.dtype, x.device

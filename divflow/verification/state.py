"""Whether a field changes itself when it is evaluated, so that it must not be evaluated more often than requested."""

import functools
import types
from collections.abc import Hashable

from torch import Tensor, nn

from divflow.verification.kept import contents, referred

__all__ = ["state_of"]


def state_of(g: object, depth: int = 0) -> Hashable:
    """Return a value that changes with what a field holds: versions of tensors, numbers, in modules, closures and containers.

    Args:
        g: the field.
        depth: of the search so far.
    """
    if isinstance(g, Tensor):
        return id(g), 0 if g.is_inference() else g._version
    if isinstance(g, (int, float, str, bool, type(None))):
        return g
    if depth == 8:
        return id(g)
    if isinstance(g, nn.Module):
        parts = [item for module in g.modules() for item in (*module._buffers.values(), *vars(module).values())]
        return tuple(state_of(item, 8) for item in parts if not isinstance(item, dict))
    parts = []
    if isinstance(g, types.FunctionType):
        parts = contents(g) + referred(g)
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
    return (id(g), *(state_of(part, depth + 1) for part in parts))

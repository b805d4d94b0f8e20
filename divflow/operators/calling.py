"""Why a function can't be called as a field g(t, x): what its signature, its dtype or its kind shows, and the remedy."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["TIMES", "misuse", "wrong_field"]

TIMES = frozenset({"t", "time", "times", "timestep", "timesteps"})
"""Names of a time among the arguments of a field."""


def wrong_field(g: Any) -> str:
    """Why g can be no field, whatever it returns: a class, not callable, or with its time second; empty if it may be one.

    Args:
        g: what was received.
    """
    if isinstance(g, type):
        return f"the field must be a module or function, but is the class {g.__name__}. Make one of it first, {g.__name__}(...)."
    if not callable(g):
        return f"the field must be a module or function g(t, x), but is a {type(g).__name__}."
    if (signature := _signature(g)) is None:
        return ""
    names = [
        it.name for it in signature.parameters.values() if it.kind in (it.POSITIONAL_ONLY, it.POSITIONAL_OR_KEYWORD)
    ]
    if len(names) < 2 or names[1] not in TIMES or names[0] in TIMES:
        return ""
    rest = "".join(f", {name}" for name in names[2:3])
    return (
        f"the field is called as g(t, x{rest}), but {_name(g)} takes ({', '.join(names[:3])}). Swap them in its definition, or use "
        f"lambda t, x{rest}: net(x, t{rest})."
    )


def misuse(g: Callable[..., Any], x: Tensor, contexts: int, error: Exception) -> str:
    """Why a call g(t, x), or g(t, x, context), failed, and what to do; empty if the error is one of g itself.

    Args:
        g: the function or module.
        x: states, with which it was called.
        contexts: 1 if a context was given, 0 if not.
        error: what was raised.
    """
    if why := wrong_field(g):
        return why
    signature, rest = _signature(g), ", context" if contexts else ""
    if signature is not None and isinstance(error, TypeError) and not _fits(signature, 2 + contexts):
        if _fits(signature, 1 + contexts) and next(iter(signature.parameters), None) not in TIMES:
            return f"the field is called as g(t, x{rest}), but {_name(g)} takes g(x{rest}), without a time. Use lambda t, x{rest}: g(x{rest})."
        if not contexts and _fits(signature, 3):
            return f"the field {_name(g)} takes {signature}, a context after t and x, but none was given. Give one, as context=..."
        if contexts and _fits(signature, 2):
            return f"the field {_name(g)} takes {signature}, no context, but one was given. Leave it out, or take it as a third argument."
    if isinstance(error, RuntimeError) and "type" in str(error):
        dtypes = {it.dtype for module in _modules(g) for it in module.parameters() if it.is_floating_point()}
        if len(dtypes) == 1 and (own := dtypes.pop()) != x.dtype:
            return f"x has {x.dtype}, but the parameters of the field have {own}. Convert one of them, x.to({own}) or module.to({x.dtype})."
    return ""


def _modules(g: Any) -> list[nn.Module]:
    """The modules that a field is, or that a function names."""
    if isinstance(g, nn.Module):
        return [g]
    try:
        found = inspect.getclosurevars(g)
    except TypeError:
        return []
    return [it for it in (*found.nonlocals.values(), *found.globals.values()) if isinstance(it, nn.Module)]


def _signature(g: Any) -> inspect.Signature | None:
    """Signature by which g is called; None if it is not known."""
    if isinstance(g, nn.Module):
        if g._forward_pre_hooks or type(g).__call__ is not nn.Module.__call__:  # which may take the time away
            return None
        g = g.forward
    try:
        return inspect.signature(g, follow_wrapped=False)  # what it wraps may be called otherwise
    except (TypeError, ValueError):  # a built-in function
        return None


def _fits(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _name(g: Callable[..., Any]) -> str:
    return getattr(g, "__name__", type(g).__name__)

"""Rules of a user's own for functions outside of torch, which torch's own override protocol makes visible."""

import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from divflow.errors import FieldError
from divflow.tape.calls import CALLS
from divflow.tape.listening import overridable
from divflow.tape.operation import name_of
from divflow.tape.rule import Rule
from divflow.tape.table import RULES

__all__ = ["inside", "register", "registered", "rule_of", "unregister"]


class _Entry(NamedTuple):
    """A registered rule.

    Attributes:
        rule: the rule.
        seen: what the tape sees: the function, or its name.
        original: what the function was; None if it is unchanged.
        restore: undoes the change.
    """

    rule: Rule
    seen: object
    original: Callable[..., Any] | None
    restore: Callable[[], None]


# By what was registered, and by what the tape sees of it.
_ENTRIES: dict[object, _Entry] = {}
_RULES: dict[object, _Entry] = {}


def register(function: Callable[..., Any], rule: Rule) -> None:
    """Register how a function is followed, so that a network that calls it keeps its closed form.

    From then on the rule is used wherever a followed field calls the function. Like every rule it is compared with
    autograd, to first or second order, at the verified calls of a field. A registered function can't be scripted by
    `torch.jit.script`.

    Args:
        function: a Python function, a subclass of `torch.autograd.Function` (for its `apply`), an operator of
            `torch.library`, or a torch function without a rule.
        rule: `Elementwise`, `Linear` or `Written`.

    Raises:
        FieldError: the function is none of these, or has a rule already. At the call of a divergence or a Laplacian: the
            rule is wrong.

    Example:
        >>> from divflow.tape import Elementwise, register, unregister
        >>> def cubed(u):
        ...     return u**3
        >>> register(cubed, Elementwise(slope=lambda u: 3 * u**2))
        >>> unregister(cubed)
    """
    if not isinstance(rule, Rule):
        raise FieldError(
            f"the rule must be an Elementwise, Linear or Written of divflow.tape, but is a {type(rule).__name__}: {rule!r}"
        )
    key = _key(function)
    if key in _ENTRIES:
        raise FieldError(f"{_named(function)} has a rule already; unregister it first")
    if isinstance(key, str) and key in RULES:
        raise FieldError(f"{_named(function)} has a rule of divflow's own, which is verified like any other")
    entry = _Entry(rule, *_seen(key))
    _ENTRIES[key] = _RULES[entry.seen] = entry


def unregister(function: Callable[..., Any]) -> None:
    """Remove the rule of a function, which is then what it was before `register`.

    Args:
        function: the function that was registered.

    Raises:
        FieldError: it has none.
    """
    entry = _ENTRIES.pop(_key(function), None)
    if entry is None:
        raise FieldError(f"{_named(function)} has no registered rule, so there is none to remove")
    del _RULES[entry.seen]
    entry.restore()


def registered(func: Any, name: str) -> Rule | None:
    """Return the rule that a user registered for a function.

    Args:
        func: the function.
        name: of the operation.
    """
    entry = (_RULES.get(func) or _RULES.get(name)) if _RULES else None
    return None if entry is None else entry.rule


def inside(func: Any) -> Callable[..., Any] | None:
    """Return what a registered function calls, for callers that must see its inside; None for any other function.

    Args:
        func: the function.
    """
    entry = _RULES.get(func) if _RULES else None
    return None if entry is None else entry.original


def rule_of(func: Any, name: str) -> Rule | None:
    """Return the rule of a torch function, or of a registered one; None if it has none.

    Args:
        func: the function.
        name: of the operation.
    """
    return RULES.get(name) or registered(func, name)


def _key(function: Any) -> Any:
    if isinstance(function, CustomOpDef):
        function = function._opoverload
    if isinstance(function, OpOverload | OpOverloadPacket):
        return name_of(function)
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return function
    if isinstance(function, types.FunctionType) and function.__module__.split(".")[0] != "torch":
        if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise FieldError(f"{_named(function)} can't be registered, because it is a generator or a coroutine")
        return function
    if callable(function) and function in torch.overrides.get_testing_overrides():
        return name_of(function)
    raise FieldError(
        f"{_named(function)} can't be registered: it must be a Python function, a subclass of torch.autograd.Function, an "
        "operator of torch.library or a torch function. For a callable object, register the function that it calls."
    )


def _named(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def _seen(key: Any) -> tuple[object, Callable[..., Any] | None, Callable[[], None]]:
    """Make calls of a function visible like those of torch functions; return what is seen, what is called, and the undo."""
    if isinstance(key, str):
        return key, None, lambda: None
    if isinstance(key, type):
        return _class_seen(key)
    code = key.__code__
    original = types.FunctionType(code, key.__globals__, key.__name__, key.__defaults__, key.__closure__)
    original.__kwdefaults__ = key.__kwdefaults__
    # The function's own code is replaced, so that every reference to it is seen, also one that was imported before.
    number = next(_NUMBERS)
    CALLS[number] = overridable(key, original)
    constants = tuple(number if constant == _NUMBER else constant for constant in _template.__code__.co_consts)
    key.__signature__ = inspect.signature(original)
    key.__code__ = _template.__code__.replace(co_consts=constants, co_freevars=code.co_freevars, co_name=code.co_name)

    def restore() -> None:
        key.__code__ = code
        del key.__signature__, CALLS[number]

    return key, original, restore


def _class_seen(kind: type) -> tuple[object, Callable[..., Any], Callable[[], None]]:
    own, original = "apply" in vars(kind), kind.apply  # type: ignore[attr-defined]

    def apply(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    apply.__name__, apply.__qualname__, apply.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    call = overridable(apply, original)
    before = vars(kind).get("apply")
    kind.apply = staticmethod(apply)  # type: ignore[attr-defined]

    def restore() -> None:
        if own:
            kind.apply = before  # type: ignore[attr-defined]
        else:
            del kind.apply  # type: ignore[attr-defined]

    return apply, original, restore


_NUMBERS = itertools.count()
_NUMBER = "the number of a call"


def _template(*args: Any, **kwargs: Any) -> Any:
    from divflow.tape.calls import call  # here, since the globals are those of the function

    return call("the number of a call", args, kwargs)

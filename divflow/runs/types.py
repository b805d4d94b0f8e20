"""Checks of the types of settings, before anything is built: each must fit the annotation of the class that takes it."""

import contextlib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.roar import BeartypeException

from divflow.saved.named import ConfigError, meant, named

__all__ = ["check_arguments", "check_targets_arguments"]

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # a whole number is a float
# Keys of the loaders' batches, not an argument of the data module.
_OF_BATCHES = ("data", "keys")
# Keys of Hydra, not arguments of the class.
_RESERVED = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def check_targets_arguments(settings: Any, name: str = "") -> None:
    """Check all settings of a config against the annotations of the classes that they name by `_target_`.

    Args:
        settings: plain values.
        name: name of the settings, for messages.

    Raises:
        ConfigError: naming the setting, its value, and what it must be; a class that can't be found, or an argument that it does not take.
    """
    if isinstance(settings, list):
        settings = dict(enumerate(settings))
    if not isinstance(settings, Mapping):
        return
    if "_target_" in settings:
        target = f"{name}._target_" if name else "_target_"
        check_arguments(named(settings["_target_"], target), settings, name)
    for key, value in settings.items():
        check_targets_arguments(value, f"{name}.{key}" if name else str(key))


def check_arguments(called: Any, settings: Mapping[str, Any], name: str) -> None:
    """Check settings against the arguments and annotations of a class or function; those with a `_target_` are skipped.

    Raises:
        ConfigError: naming the setting, its value, and what it must be; or an argument that is not taken.
    """
    _check_taken(called, settings, name)
    hints = _hints(called)
    for key, value in settings.items():
        if key in _RESERVED or key not in hints or _is_built(value):
            continue
        if not _fits(value, hints[key]):
            shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            listed = f". Write a list, {name}.{key}=[{value}]" if _fits([value], hints[key]) else ""
            raise ConfigError(f"{name}.{key} must be {_in_words(hints[key])}, but is {shown}{listed}")


def _check_taken(called: Any, settings: Mapping[str, Any], name: str) -> None:
    try:
        parameters = inspect.signature(called).parameters
    except (ValueError, TypeError):  # some built-in types have no signature
        return
    if any(it.kind is inspect.Parameter.VAR_KEYWORD for it in parameters.values()):
        return
    known = [key for key, it in parameters.items() if it.kind is not inspect.Parameter.POSITIONAL_ONLY]
    for key in settings:
        if key not in (*known, *_RESERVED) and (name, key) != _OF_BATCHES:
            label = getattr(called, "__name__", called)
            hint = (
                meant(str(key), known) or f"; it takes {', '.join(known[:12]) or 'none'}{', ...' if known[12:] else ''}"
            )
            raise ConfigError(f"{name}.{key} is no setting of {label}{hint}")


def _hints(called: Any) -> dict[str, Any]:
    """Annotations of the arguments, including those that a class passes on to its base."""
    classes = reversed(called.__mro__) if inspect.isclass(called) else ()
    hints: dict[str, Any] = {}
    for function in [vars(it)["__init__"] for it in classes if "__init__" in vars(it)] or [called]:
        parameters: Mapping[str, inspect.Parameter] = {}
        own: dict[str, Any] = {}
        # Classes without signature, or with names for type checkers alone, are not checked.
        with contextlib.suppress(Exception):
            parameters = inspect.signature(function).parameters
            own = typing.get_type_hints(inspect.unwrap(function))
        hands_on = any(it.kind is inspect.Parameter.VAR_KEYWORD for it in parameters.values())
        hints = (hints if hands_on else {}) | {name: own[name] for name in parameters if name in own}
    return hints


def _is_built(value: Any) -> bool:
    """Whether a value is, or contains, one that a class of its own builds."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_is_built, value.values()))
    return isinstance(value, list) and any(map(_is_built, value))


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool) and hint in (int, float):  # which is a number in Python
        return False
    forms = (value, tuple(value)) if isinstance(value, list) else (value,)
    try:
        return any(is_bearable(form, hint, conf=_NUMBERS) for form in forms)
    except BeartypeException:  # an annotation that beartype does not support
        return True


def _in_words(hint: Any) -> str:
    shown = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
    return (
        shown.replace("typing.", "").replace("collections.abc.", "").replace("NoneType", "null").replace("None", "null")
    )

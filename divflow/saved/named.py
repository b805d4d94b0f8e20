"""What settings name by `_target_`: found and made, or refused with what to do."""

import difflib
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object, instantiate

from divflow.errors import DivflowError

__all__ = ["ConfigError", "made", "meant", "named"]


class ConfigError(DivflowError, ValueError):
    """A setting is not what the program needs."""


def named(target: str, setting: str) -> Any:
    """The class or function that a setting names.

    Args:
        target: its dotted name.
        setting: the setting, for messages.

    Raises:
        ConfigError: it can't be found or imported, with the reason and what to do.
    """
    log = logging.getLogger("hydra.utils")  # would print the same in three lines
    disabled, log.disabled = log.disabled, True
    try:
        return get_object(target)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{setting}={target} {_why(target, error.__cause__ or error)}") from error
    finally:
        log.disabled = disabled


def made(setting: str, config: Mapping[str, Any], kind: type) -> Any:
    """What the class that a setting names makes of its settings.

    Raises:
        ConfigError: no class is named, it can't be found, lacks a method, or is of another kind.
    """
    target = config.get("_target_")
    if target is None:
        raise ConfigError(f"{setting} must name a class by {setting}._target_, but is {dict(config)!r}")
    called = named(target, f"{setting}._target_")
    if inspect.isabstract(called):
        lacking = ", ".join(sorted(called.__abstractmethods__))
        raise ConfigError(f"{setting}._target_={target} lacks the method {lacking} of {_place(kind)}; write it")
    found = instantiate(config, _convert_="all")
    if not isinstance(found, kind):
        raise ConfigError(
            f"{setting}._target_={target} made a {type(found).__name__}, which is no {kind.__name__}; derive it from {_place(kind)}"
        )
    return found


def meant(name: str, known: list[str], likeness: float = 0.6) -> str:
    """A hint at the known name that is most like this one; empty if none is as like as `likeness`, at most 1."""
    close = difflib.get_close_matches(name, known, 1, likeness)
    return f" (did you mean {close[0]}?)" if close else ""


def _place(kind: type) -> str:
    """Where it is imported from: `divflow.divergence.Estimator`."""
    return f"divflow.{kind.__module__.split('.')[1]}.{kind.__name__}"


def _why(target: str, cause: BaseException) -> str:
    """Why there is nothing of that name, and what to do."""
    missing = getattr(cause, "name", None) or ""
    module, _, _ = target.partition(".")
    if isinstance(cause, ModuleNotFoundError) and missing == module:
        return f"can't be found: there is no module {module!r} here; run the command in the folder that holds it, or install it by pip"
    if isinstance(cause, ModuleNotFoundError) and target.startswith(missing):
        parent, _, missing = missing.rpartition(".")
    elif isinstance(cause, AttributeError) and f".{missing}" in target:
        parent = target[: target.index(f".{missing}")]
    else:
        first = next(iter(str(cause).splitlines()), "")
        return f"can't be imported: {type(cause).__name__}: {first}"
    return f"can't be found: {parent} has no {missing!r}{meant(missing, dir(sys.modules.get(parent)))}"

"""A command line as Hydra's parser needs it."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["OPTIONS", "for_hydra"]

_FOLDERS = ("--config-path", "-cp")
# Options whose value is the next argument.
_WITH_VALUE = (
    *_FOLDERS,
    *("--config-name", "-cn", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p", "--experimental-rerun"),
)
OPTIONS = (
    *_WITH_VALUE,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--info", "-i"),
)
"""All options of Hydra's parser."""
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Options before settings, which Hydra's parser does not take in turns, and a --config-path of the current folder.

    Hydra takes a relative --config-path from the folder of the program, in which a user has nothing.
    """
    options: list[str] = []
    settings: list[str] = []
    before = ""
    for argument in arguments:
        of_option = before in _WITH_VALUE or (before in ("--info", "-i") and argument in _INFO)
        name, equals, path = argument.partition("=")
        if before in _FOLDERS:
            argument = _absolute(argument)
        elif name in _FOLDERS and equals:
            argument = f"{name}={_absolute(path)}"
        is_option = of_option or argument.startswith("-")
        (options if is_option else settings).append(argument)
        before = "" if of_option else argument
    return [*options, *settings]


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())

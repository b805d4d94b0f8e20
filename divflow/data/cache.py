"""Files of results that are expensive to compute and always the same: kept under a key, and computed again if they can't be used."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from divflow.data.module import DataError

__all__ = ["StaleError", "cache_folder", "cached"]


class StaleError(DataError):
    """A kept file can't be used; the message, which follows its name, gives the reason."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/divflow`, or `~/.cache/divflow`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "divflow"


def cached(
    folder: Path,
    name: str,
    settings: str,
    version: int,
    make: Callable[[], dict[str, Any]],
    check: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return what `make` returns, read from a file if it was made before with the same settings and version.

    A file of another version, one that can't be read, or one that the check refuses is made again, and this is reported. It is written
    under another name and then moved, so that no process reads half of it.

    Args:
        folder: folder of the file; made if it does not exist.
        name: first part of the file's name.
        settings: everything that the result depends on.
        version: version of the computation.
        make: returns tensors and numbers by name.
        check: check of what was read; raises `StaleError` if it is not what `make` returns.

    Raises:
        DataError: before anything is made: the folder can't be written to, or a folder has the name of the file.
    """
    path = folder / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.pt"
    key = f"version {version}: {settings}"
    if path.is_file():
        try:
            found = _read(path, key)
            check(found)
        except StaleError as why:
            print(f"{path} {why}. Making it again")
        else:
            return found
    _check_writable(folder, path)
    print(f"making samples of {name} once, to be kept in {path}")
    made = make()
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({"key": key, **made}, partial)
    partial.replace(path)
    return made


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        found = torch.load(path, weights_only=True)
    except Exception as error:  # other bytes raise errors of any type
        raise StaleError(f"can't be read ({type(error).__name__})") from error
    if not isinstance(found, dict) or found.pop("key", None) != key:
        raise StaleError("is of another version, or damaged")
    return found


def _check_writable(folder: Path, path: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder {folder} for kept samples can't be made ({error}). Give another one by cache=..."
        ) from error
    if path.is_dir():
        raise DataError(
            f"{path}, the file for kept samples, is a folder. Remove it, or give another place by cache=..."
        )
    if not os.access(folder, os.W_OK):
        raise DataError(f"the folder {folder} for kept samples can't be written to. Give another one by cache=...")

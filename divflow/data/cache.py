"""Files of what takes long to make and is the same each time: kept under a key, made anew where the key is another."""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_folder", "cached"]


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/divflow`, or `~/.cache/divflow`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "divflow"


def cached(folder: Path, name: str, settings: str, version: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, read from a file of the folder where it was made before by the same settings and version.

    A file of another version, or one that can't be read, is made anew, and says so. It is written under another name and
    then moved, so that no process reads half of it.

    Args:
        folder: made if it is not there.
        name: to tell files apart by.
        settings: everything that the result depends on.
        version: of the way it is made.
        make: tensors and numbers by name.
    """
    path = folder / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.pt"
    key = f"version {version}: {settings}"
    if path.is_file():
        found = _read(path)
        if found is not None and found.pop("key", None) == key:
            return found
        print(f"{path} is of another version, or damaged; it is made anew")
    print(f"making samples of {name}, once: they are kept in {path}")
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({"key": key, **made}, partial)
    partial.replace(path)
    return made


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, OSError):
        return None

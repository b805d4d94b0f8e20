"""Files that are replaced completely or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from divflow.errors import DivflowError

__all__ = ["WriteError", "save_whole"]


class WriteError(DivflowError, OSError):
    """A checkpoint could not be written; the previous file is kept."""


@contextlib.contextmanager
def save_whole(trainer: L.Trainer, path: str | Path) -> Iterator[Path]:
    """Provide a temporary file beside `path`, which replaces `path` once it is on the disk.

    Raises:
        WriteError: it could not be written, for example because the disk is full.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        if trainer.is_global_zero:
            with open(part, "rb") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        kept = "the previous file is kept" if path.is_file() else "there is no previous one"
        raise WriteError(
            f"{path} could not be written ({error.strerror or error}); {kept}. Free some space and resume"
        ) from error

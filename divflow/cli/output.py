"""Files that commands write (existing ones are kept; new ones appear complete or not at all), and the bar while they are made."""

import csv
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track

from divflow.errors import DivflowError
from divflow.saved.build import ConfigError

if TYPE_CHECKING:  # takes a while to import, and mistakes are reported first
    from matplotlib.figure import Figure

__all__ = ["OutputError", "batches", "check_output", "write_figure", "write_lines", "write_table"]


class OutputError(DivflowError, OSError):
    """The results of a command could not be written to their file."""


def check_output(out: str, suffixes: Sequence[str], overwrite: bool) -> Path:
    """Path of the file to write, after a check that it can be written.

    Raises:
        ConfigError: its type is unknown, it exists and may not be overwritten, or nothing can be written there.
    """
    path = Path(out).expanduser()
    if path.suffix not in suffixes:
        raise ConfigError(
            f"out must end in {' or '.join(suffixes)}, but out={out} has the suffix {path.suffix or '(none)'!r}"
        )
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists. Choose another file by out=..., or let it be replaced by overwrite=true")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as tried:
            tried.write(bytes(4096))
    except OSError as error:
        raise ConfigError(f"out={out} can't be written ({error.strerror}). Choose another file by out=...") from error
    return path


def write_table(path: Path, names: Sequence[str], rows: np.ndarray, whole: Sequence[str] = ()) -> None:
    """Write rows as a `.csv` with a header, flattened to `(n, len(names))`, or as an `.npy` without flattening.

    Args:
        path: of the file.
        names: names of the columns.
        rows: `(n, ...)`.
        whole: names of the columns of whole numbers, which a `.csv` shows without a fraction.
    """

    def save(part: Path) -> None:
        with open(part, "wb") as file:
            np.save(file, rows)

    if path.suffix == ".npy":
        _write_whole(path, save)
        return
    columns = rows.reshape(len(rows), len(names)).T
    written = [
        (it.astype(np.int64) if name in whole else it).astype(str) for name, it in zip(names, columns, strict=True)
    ]
    write_lines(path, [list(names), *np.stack(written, axis=1).tolist()])


def write_lines(path: Path, lines: Sequence[Sequence[str]]) -> None:
    """Write cells of text as a `.csv`."""

    def write(part: Path) -> None:
        with open(part, "w", newline="") as file:
            csv.writer(file).writerows(lines)

    _write_whole(path, write)


def write_figure(path: Path, figure: "Figure") -> None:
    """A figure as `.png`."""
    _write_whole(path, lambda part: figure.savefig(part, dpi=150, format="png"))


def batches(number: int, size: int, doing: str, *, shown: bool = True) -> Iterator[slice]:
    """Slices of at most `size` out of `number`, with a progress bar on a terminal if `shown`."""
    slices = [slice(start, min(start + size, number)) for start in range(0, number, size)]
    console = Console(stderr=True)
    yield from track(slices, doing, console=console, disable=not (shown and sys.stderr.isatty()), transient=True)


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file; if that fails at the end of the work, write one of that name in a temporary folder."""
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="divflow-")) / path.name
        write(elsewhere)
        raise OutputError(
            f"{path} could not be written ({error.strerror or error}). It is saved as {elsewhere}"
        ) from error

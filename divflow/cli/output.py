"""The files that commands write: kept if they exist, and written whole or not at all; and the bar while they are made."""

import contextlib
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track

from divflow.build import ConfigError

if TYPE_CHECKING:  # takes a while to import, and mistakes are told before
    from matplotlib.figure import Figure

__all__ = ["batches", "check_output", "write_figure", "write_table"]


def check_output(out: str, suffixes: Sequence[str], overwrite: bool) -> Path:
    """The file to write.

    Raises:
        ConfigError: of an unknown kind, or it exists and may not be overwritten.
    """
    path = Path(out).expanduser()
    if path.suffix not in suffixes:
        raise ConfigError(f"out={out} is of type {path.suffix or '(none)'!r}; it must end in {' or '.join(suffixes)}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another file by out=..., or let it be replaced by overwrite=true")
    return path


def write_table(path: Path, names: Sequence[str], rows: np.ndarray) -> None:
    """Rows as a `.csv` with a header, flattened to `(n, len(names))`, or as an `.npy` as they are."""
    with _whole(path) as part:
        if path.suffix == ".npy":
            with open(part, "wb") as file:
                np.save(file, rows)
            return
        with open(part, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(rows.reshape(len(rows), -1).astype(str).tolist())


def write_figure(path: Path, figure: "Figure") -> None:
    """A figure as `.png`."""
    with _whole(path) as part:
        figure.savefig(part, dpi=150, format="png")


def batches(number: int, size: int, doing: str, *, shown: bool = True) -> Iterator[slice]:
    """Slices of at most `size` out of `number`, with a progress bar on a terminal if it is to be `shown`."""
    slices = [slice(start, min(start + size, number)) for start in range(0, number, size)]
    console = Console(stderr=True)
    yield from track(slices, doing, console=console, disable=not (shown and sys.stderr.isatty()), transient=True)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

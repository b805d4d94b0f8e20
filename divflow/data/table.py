"""Your own table: the numeric columns of a .csv, .npy or .parquet file."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from divflow.data.columns import Bounds, Columns, as_names, column_rows
from divflow.data.module import DataError, Rows
from divflow.data.split import row_digests
from divflow.data.suspicious import warn_of_suspicious
from divflow.data.text_file import check_numbers, read_text
from divflow.data.text_format import TextFormat

__all__ = ["Table", "all_rows", "read_table", "used_columns"]

_PLAIN = TextFormat()
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


class Table(Columns):
    r"""Rows of numbers from a file, one row a sample, standardized by the training rows.

    Log-densities are per unit of the file's columns. Booleans are taken as 0 and 1. A warning names what is probably no data or has
    no density: columns that count the rows, whole numbers and ids, repeated rows, and linearly dependent columns.

    Args:
        path: a `.csv`, also compressed (`.csv.gz`), a `.parquet`, or an `.npy` of shape (rows, columns). A `.csv` may have a
            header; a first row that holds only numbers is data. Lines before it that begin with # are comments.
        columns: names of the columns to use (numbers for an `.npy`), or one name; all if None.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.
        separator: separator of columns in a `.csv`, one character; `\t` is the tab.
        bounds: bounds of columns, `{name: (low, high)}`, None for no bound on that side (`Columns`).
        context: names of the columns that condition the density of the others.
        discrete: names of columns of whole numbers, which get noise (`Columns`).
        decimal: decimal mark of numbers in a `.csv`.
        thousands: character that groups digits of numbers in a `.csv`; None for none.
        encoding: encoding of a `.csv`; None for UTF-8, or UTF-16 if the file begins with its mark.
        weight: name of the column with the relative importance of each row (`Columns`).

    Raises:
        DataError: naming the file, column or row: the file is missing, or has another format, separator or encoding; columns are
            missing, not numeric or constant; rows are not finite, too few, or beyond bounds.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.save(f"{folder}/rows.npy", numpy.random.default_rng(0).normal(size=(100, 3)))
        ...     Table(f"{folder}/rows.npy").event_shape
        (3,)
    """

    def __init__(
        self,
        path: str | Path,
        columns: str | Sequence[str] | None = None,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        separator: str = ",",
        bounds: Bounds | None = None,
        context: str | Sequence[str] | None = None,
        discrete: str | Sequence[str] | None = None,
        decimal: str = ".",
        thousands: str | None = None,
        encoding: str | None = None,
        weight: str | int | None = None,
    ) -> None:
        rows, names = read_table(
            path, used_columns(columns, context, weight), TextFormat(separator, decimal, thousands, encoding)
        )
        super().__init__(
            rows,
            names,
            batch_size,
            eval_batch_size,
            val_fraction,
            test_fraction,
            seed,
            bounds,
            context,
            discrete,
            weight,
        )
        whole = as_names(discrete, "discrete") or []
        warn_of_suspicious(rows, self._digests, names, self.columns, whole, Path(path).name)


def used_columns(
    columns: str | Sequence[str] | None, context: str | Sequence[str] | None, weight: str | int | None
) -> list[str] | None:
    """Names of the columns that are modelled, context or weights; None for all."""
    modelled = as_names(columns, "columns")
    given = [*(as_names(context, "context") or []), *(as_names(weight, "weight") or [])]
    return None if modelled is None else [*modelled, *(name for name in given if name not in modelled)]


def all_rows(
    path: str | Path,
    columns: str | Sequence[str] | None = None,
    context: str | Sequence[str] | None = None,
    discrete: str | Sequence[str] | None = None,
    seed: int = 0,
    separator: str = ",",
    decimal: str = ".",
    thousands: str | None = None,
    encoding: str | None = None,
    weight: str | int | None = None,
    **others: Any,
) -> tuple[Rows, Tensor]:
    """All rows of a file, in its order and undivided, for settings of a `Table`; and their digests.

    Raises:
        DataError: as `Table`, or for a setting that a table does not have.
    """
    if unknown := sorted(set(others) - set(inspect.signature(Table).parameters)):
        raise DataError(
            f"a table has no setting {', '.join(unknown)}. Choose from {', '.join(inspect.signature(Table).parameters)}"
        )
    rows, names = read_table(
        path, used_columns(columns, context, weight), TextFormat(separator, decimal, thousands, encoding)
    )
    given, counts = as_names(context, "context") or [], as_names(weight, "weight") or []
    order = sorted(range(len(names)), key=lambda i: (names[i] in counts, names[i] in given))  # as `Columns` has them
    return column_rows(rows, names, context, discrete, seed, weight), row_digests(rows[:, order])


def read_table(
    path: str | Path,
    columns: str | Sequence[str] | Callable[[list[str]], list[str]] | None = None,
    written: TextFormat = _PLAIN,
    entries: Sequence[str] | None = None,
) -> tuple[Tensor, list[str]]:
    """Read columns of a file as float64, `(rows, columns)` in the file's order, with their names.

    Args:
        path: as for `Table`.
        columns: names of the columns, in the order to take them, or one name; all if None. A function makes them of those of the file.
        written: format of a `.csv`.
        entries: names of the entries of matrices, of which an `.npy` may have one for each row.

    Raises:
        DataError: the file is missing, has no rows, or another format or separator; columns are missing or not numeric.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no file {path} (looked in {Path.cwd()}). Set data.path to a .csv, .npy or .parquet file"
        )
    kind = path.suffix.lower()
    if kind in _COMPRESSED and (inner := Path(path.stem).suffix.lower()) == ".csv":
        kind = inner
    if written.separator != "," and kind != ".csv":
        raise DataError(f"separator={written.separator!r} is for .csv files, but {path.name} is none. Leave it out")
    try:
        if kind == ".npy":
            table = _from_array(np.load(path, allow_pickle=False), path, entries)
        elif kind == ".csv":
            table = read_text(path, written)
        elif kind == ".parquet":
            table = pa.parquet.read_table(path)
        else:
            raise DataError(
                f"a table must be a .csv (or .csv.gz), .npy or .parquet file, but {path.name} has the suffix {path.suffix or '(none)'!r}"
            )
    except (pa.ArrowException, ValueError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} could not be read as {kind}: {error}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise DataError(f"{path.name} has columns of the same name: {', '.join(table.column_names)}. Rename them")
    chosen = columns(table.column_names) if callable(columns) else as_names(columns, "columns")
    if chosen is not None:
        missing = [name for name in chosen if name not in table.column_names]
        if missing:
            raise DataError(
                f"{path.name} has no column {', '.join(missing)}. Choose from {', '.join(table.column_names)}"
            )
        table = table.select(chosen)
    if table.num_columns == 0:
        raise DataError(f"{path.name} has no columns")
    if table.num_rows == 0:
        raise DataError(f"{path.name} has the columns {', '.join(table.column_names)}, but no rows")
    check_numbers(table, path.name, written)
    arrays = [column.to_numpy().astype(np.float64) for column in table.columns]
    return torch.as_tensor(np.stack(arrays, axis=1), device="cpu"), table.column_names


def _from_array(array: object, path: Path, entries: Sequence[str] | None) -> pa.Table:
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path.name} holds several arrays, as an .npz file does. Save the table alone by numpy.save")
    names = None
    if entries is not None and array.ndim == 3 and math.prod(array.shape[1:]) == len(entries):
        array, names = array.reshape(len(array), -1), entries
    if array.ndim != 2:
        raise DataError(f"a table must have two dimensions, rows and columns, but {path.name} has shape {array.shape}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)  # which pyarrow needs
    return pa.table(dict(zip(names or map(str, range(native.shape[1])), native.T, strict=True)))

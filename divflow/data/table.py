"""A table of one's own: the numeric columns of a .csv, .npy or .parquet file."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from divflow.data.columns import Bounds, Columns, listed
from divflow.data.module import DataError
from divflow.data.separator import apparent_separator, checked_separator

__all__ = ["Table", "read_table"]


class Table(Columns):
    r"""Rows of numbers from a file, one row a sample, standardized by the training rows.

    The standardization's log-determinant is accounted for: log-densities are per unit of the file's columns. Booleans are
    taken as 0 and 1. Columns that are linear functions of others (a sum beside its terms, all columns of a one-hot code)
    are warned of, since the rows then lie in a plane, where a density has no bound; neither has it where a column
    takes few values, such as booleans: its likelihood grows for as long as training goes on, and says little.

    Args:
        path: a `.csv` (with a header, or without one: a first row that is all numbers is data), `.parquet`, or `.npy` of shape (rows, columns).
        columns: names of the columns to use (numbers for an `.npy`); all if None.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.
        separator: of a `.csv`, one character; `\t` is the tab.
        bounds: of columns that are known to end there, `{name: (low, high)}`, None for no bound on that side (`Columns`).

    Raises:
        DataError: a missing file, another format or separator, missing, non-numeric or constant columns, rows that are
            not finite, too few of them, or beyond bounds; each named.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str] | None = None,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        separator: str = ",",
        bounds: Bounds | None = None,
    ) -> None:
        rows, names = read_table(path, columns, separator)
        super().__init__(rows, names, batch_size, eval_batch_size, val_fraction, test_fraction, seed, bounds)


def read_table(
    path: str | Path, columns: Sequence[str] | None = None, separator: str = ","
) -> tuple[Tensor, list[str]]:
    """The chosen columns of a file as float64, `(rows, columns)` in the file's order, and their names.

    Args:
        path: a `.csv` (with a header, or without one: a first row that is all numbers is data), `.parquet`, or `.npy` of shape (rows, columns).
        columns: their names, in the order to take them; all if None.
        separator: of a `.csv`, one character.

    Raises:
        DataError: a missing file, another format or separator, missing or non-numeric columns.
    """
    path, separator = Path(path).expanduser(), checked_separator(separator)
    if not path.is_file():
        raise DataError(
            f"there is no file {path} (looked in {Path.cwd()}); set data.path to a .csv, .npy or .parquet file"
        )
    if separator != "," and path.suffix != ".csv":
        raise DataError(f"separator={separator!r} is that of a .csv file, but {path.name} is none")
    try:
        if path.suffix == ".npy":
            table = _from_array(np.load(path, allow_pickle=False), path)
        elif path.suffix == ".csv":
            table = _from_csv(path, separator)
        elif path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
        else:
            raise DataError(
                f"{path.name} is of type {path.suffix or '(none)'!r}; a table is a .csv, .npy or .parquet file"
            )
    except (pa.ArrowException, ValueError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} could not be read as {path.suffix}: {error}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise DataError(f"{path.name} has columns of the same name: {', '.join(table.column_names)}; rename them")
    if columns is not None:
        missing = [str(name) for name in columns if str(name) not in table.column_names]
        if missing:
            raise DataError(f"{path.name} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
        table = table.select([str(name) for name in columns])
    text = [
        f"{field.name} ({field.type}, such as {column[0].as_py()!r})"
        for field, column in zip(table.schema, table.columns, strict=True)
        if not _is_number(field.type) and len(column)
    ]
    if text:
        raise DataError(
            f"{path.name} has columns that are not numbers: {listed(text)}; leave them out, by columns=[...], or encode them"
        )
    if table.num_columns == 0:
        raise DataError(f"{path.name} has no columns")
    arrays = [column.to_numpy().astype(np.float64) for column in table.columns]
    return torch.as_tensor(np.stack(arrays, axis=1), device="cpu"), table.column_names


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _from_array(array: object, path: Path) -> pa.Table:
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path.name} holds several arrays, as an .npz file does; save the table alone by numpy.save")
    if array.ndim != 2:
        raise DataError(f"{path.name} has shape {array.shape}; a table has two dimensions, rows and columns")
    return pa.table({str(i): column for i, column in enumerate(array.T)})


def _from_csv(path: Path, separator: str) -> pa.Table:
    other = apparent_separator(path, separator)
    if other is not None:
        raise DataError(
            f"the columns of {path.name} seem to be separated by {other!r}, and not by {separator!r}; set it by "
            f'"data.separator={other!r}" (with both quotes)'
        )
    parsing = pa.csv.ParseOptions(delimiter=separator)
    table = pa.csv.read_csv(path, parse_options=parsing)
    names = table.column_names
    if all(_parses(name) for name in names):  # no header: its first row is data
        if len(names) > 1 and names == [str(i) for i in range(len(names))]:
            warnings.warn(
                f"the first row of {path.name}, {listed(names)}, is taken for data, as all of it are numbers; if it is the header "
                "that pandas gives to columns without names, rename them, or write the file by to_csv(header=False)",
                stacklevel=4,
            )
        options = pa.csv.ReadOptions(autogenerate_column_names=True)
        return pa.csv.read_csv(path, read_options=options, parse_options=parsing)
    return table


def _parses(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True

"""A table of one's own: the numeric columns of a .csv, .npy or .parquet file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from divflow.data.module import DataError, Rows, TensorDataModule, check_finite, split_rows
from divflow.transforms import Affine

__all__ = ["Table", "read_table"]


class Table(TensorDataModule):
    """Rows of numbers from a file, one row a sample, standardized by the training rows.

    The standardization's log-determinant is accounted for: log-densities are per unit of the file's columns.

    Args:
        path: a `.csv` (with or without a header), `.parquet`, or `.npy` of shape (rows, columns).
        columns: names of the columns to use (numbers for an `.npy`); all if None.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.

    Raises:
        DataError: a missing file, another format, missing, non-numeric or constant columns, rows that are not
            finite, or too few of them; each named.
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
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        rows, self.columns = read_table(path, columns)
        check_finite(rows, self.columns)
        train, val, test = split_rows(rows, val_fraction, test_fraction, seed)
        constant = [name for name, deviation in zip(self.columns, train.std(dim=0), strict=True) if deviation == 0]
        if constant:
            raise DataError(
                f"column {', '.join(constant)} is constant over the training rows, so it has no density; leave it out, "
                "by columns=[...]"
            )
        self.event_shape = (rows.shape[1],)
        self.transform = Affine(train.mean(dim=0), train.std(dim=0))
        self.train, self.val, self.test = Rows(train), Rows(val), Rows(test)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """The chosen columns of a file as float64, `(rows, columns)` in the file's order, and their names.

    Args:
        path: a `.csv` (with or without a header), `.parquet`, or `.npy` of shape (rows, columns).
        columns: their names, in the order to take them; all if None.

    Raises:
        DataError: a missing file, another format, missing or non-numeric columns.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no file {path} (looked in {Path.cwd()}); set data.path to a .csv, .npy or .parquet file"
        )
    try:
        if path.suffix == ".npy":
            table = _from_array(np.load(path, allow_pickle=False), path)
        elif path.suffix == ".csv":
            table = _from_csv(path)
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
    if columns is not None:
        missing = [str(name) for name in columns if str(name) not in table.column_names]
        if missing:
            raise DataError(f"{path.name} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
        table = table.select([str(name) for name in columns])
    text = [f"{field.name} ({field.type})" for field in table.schema if not _is_number(field.type)]
    if text:
        raise DataError(
            f"{path.name} has columns that are not numbers: {', '.join(text)}; leave them out, by columns=[...], or encode them"
        )
    if table.num_columns == 0:
        raise DataError(f"{path.name} has no columns")
    arrays = [column.to_numpy().astype(np.float64) for column in table.columns]
    return torch.as_tensor(np.stack(arrays, axis=1)), table.column_names


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _from_array(array: np.ndarray, path: Path) -> pa.Table:
    if array.ndim != 2:
        raise DataError(f"{path.name} has shape {array.shape}; a table has two dimensions, rows and columns")
    return pa.table({str(i): column for i, column in enumerate(array.T)})


def _from_csv(path: Path) -> pa.Table:
    table = pa.csv.read_csv(path)
    if all(_parses(name) for name in table.column_names):  # no header: its first row is data
        return pa.csv.read_csv(path, read_options=pa.csv.ReadOptions(autogenerate_column_names=True))
    return table


def _parses(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True

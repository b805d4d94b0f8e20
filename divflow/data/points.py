"""Tables whose rows name points of a manifold: base of places, angles and rotations."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from divflow.data.columns import as_names, column_rows, standardization
from divflow.data.module import DataError, Rows
from divflow.data.split import SplitData, row_digests
from divflow.data.suspicious import warn_of_repeated
from divflow.data.table import read_table, used_columns
from divflow.data.text_format import TextFormat
from divflow.manifolds import Coordinates

__all__ = ["PointRows", "Points", "read_points", "warn_of_radians"]

Names = str | Sequence[str] | None


class PointRows(NamedTuple):
    """All points of a file, in its order.

    Attributes:
        rows: points `(n, *event)`, with context and weights.
        table: the numbers of the file, `(n, columns)`: those of the points, of the context, and the weights.
        columns: names of the columns of the points.
        context_columns: names of the columns of the context.
        weight: name of the column of the weights, in a list; empty if there is none.
        coordinates: in which the file has the points.
        file: its name.
    """

    rows: Rows
    table: Tensor
    columns: list[str]
    context_columns: list[str]
    weight: list[str]
    coordinates: Coordinates
    file: str

    @property
    def digests(self) -> Tensor:
        """A number for each row, by `row_digests`."""
        return row_digests(self.table)


class Points(SplitData):
    """Base of tables whose rows name points of a manifold, split by seed.

    Batches are points in the manifold's ambient coordinates, and are not standardized. Log-densities are in nats with respect to the
    manifold's volume, whatever the unit of the file.

    Args:
        found: the points of the file.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.

    Attributes:
        columns: names of the columns of the points.
        context_columns: names of the context columns.
        coordinates: in which the file has the points, and samples are written.
        manifold: that of the points.
        read: of each class, reads all points of a file by those of its settings that are about files.

    Raises:
        DataError: there are too few rows, or a context column is constant.
    """

    read: ClassVar[Callable[..., PointRows]]

    def __init__(
        self,
        found: PointRows,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self._all, self.columns, self.context_columns = found.rows, found.columns, found.context_columns
        self._names = [*found.columns, *found.context_columns, *found.weight]
        self.coordinates, self.manifold = found.coordinates, found.coordinates.manifold
        self.event_shape, self.context_features = tuple(self.manifold.event_shape), len(found.context_columns)
        self._split(found.table, val_fraction, test_fraction, seed)
        if self._all.context is not None:
            self.context_transform = standardization(self._all.context[self.train.numbers], self.context_columns)
        warn_of_repeated(self._digests, found.file, stacklevel=4)

    def _divide(self, train: Tensor, val: Tensor, test: Tensor) -> None:
        self.train, self.val, self.test = (self._all.taken(it) for it in (train, val, test))

    @classmethod
    def all_rows(cls, **settings: Any) -> tuple[Rows, Tensor]:
        """All points of a file, in its order and undivided, for settings of this class; and the digests of its rows.

        Raises:
            DataError: as this class, or for a setting that it does not have.
        """
        known, used = (inspect.signature(it).parameters for it in (cls, cls.read))
        if unknown := sorted(set(settings) - set(known)):
            raise DataError(f"{cls.__name__} has no setting {', '.join(unknown)}. Choose from {', '.join(known)}")
        found = cls.read(**{name: value for name, value in settings.items() if name in used})
        return found.rows, found.digests


def read_points(
    path: str | Path,
    columns: Names,
    context: Names,
    weight: str | int | None,
    written: TextFormat,
    usual: Callable[[list[str]], list[str]],
    coordinates: Callable[[Tensor, list[str]], Coordinates],
    entries: Sequence[str] | None = None,
) -> PointRows:
    """Read the points of a file.

    Args:
        path: as for `Table`.
        columns: names of the columns of the points; None for the usual ones.
        context: names of the context columns.
        weight: name of the column of the weights.
        written: format of a `.csv`.
        usual: makes the columns of the points, of all that are neither context nor weights.
        coordinates: makes the coordinates, of the numbers `(n, columns)` and the names of these columns.
        entries: names of the entries of matrices, as for `read_table`.

    Raises:
        DataError: as `read_table`, or rows are not finite.
        ManifoldError: rows that name no point.
    """
    given, counts = as_names(context, "context") or [], as_names(weight, "weight") or []

    def chosen(names: list[str]) -> list[str]:
        if columns is not None:
            return used_columns(columns, context, weight) or []
        others = [name for name in names if name not in (*given, *counts)]
        return [*usual(others), *given, *counts]

    table, names = read_table(path, chosen, written, entries)
    found = column_rows(table, names, context, None, 0, weight)
    own = [name for name in names if name not in (*given, *counts)]
    ordered = [*own, *(name for name in names if name in given), *counts]
    written_in = coordinates(found.rows, own)
    points = written_in.points(found.rows)
    table = table[:, [names.index(name) for name in ordered]]
    return PointRows(
        Rows(points, context=found.context, weight=found.weight),
        table,
        own,
        [name for name in names if name in given],
        counts,
        written_in,
        Path(path).name,
    )


def warn_of_radians(numbers: Tensor, unit: str, file: str) -> None:
    """Warn of degrees that are all as small as radians.

    Args:
        numbers: angles of the file.
        unit: in which they are taken.
        file: name of the file.
    """
    largest = numbers.abs().max().item()
    if unit == "degrees" and largest <= 2 * torch.pi:
        warnings.warn(
            f"all angles of {file} lie within {largest:.3g} of zero, as radians do, but are taken as degrees. If they are radians, set "
            "data.unit=radians",
            stacklevel=4,
        )

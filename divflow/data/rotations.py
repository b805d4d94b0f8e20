"""Rotations in a table or an array, as quaternions or matrices."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from divflow.data.module import DataError
from divflow.data.points import Names, PointRows, Points, read_points
from divflow.data.text_format import TextFormat
from divflow.manifolds import Quaternions, RotationMatrices

__all__ = ["Rotations"]


class Rotations(Points):
    """Orientations from a file, one a row, as rotation matrices `(3, 3)`.

    - **Log-densities** are in nats with respect to the volume of SO(3), 8 pi^2 in all (`SpecialOrthogonal`).
    - **Samples** by the command `divflow sample` are written as the file has them.

    Args:
        path: a `.csv`, `.parquet` or `.npy` with four columns of quaternions or nine of matrices, row by row. An `.npy` may also hold
            matrices `(n, 3, 3)`.
        columns: names of the four or nine columns; all if None.
        order: of quaternions, "wxyz" with the real part first or "xyzw" with it last.
        tolerance: how far norms, or entries of matrices, may be from those of rotations. Rows within it are projected.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.
        context: names of columns that condition the density of the others.
        weight: name of the column with the relative importance of each row.
        separator: separator of columns in a `.csv`.
        decimal: decimal mark of numbers in a `.csv`.
        thousands: character that groups digits of numbers in a `.csv`; None for none.
        encoding: encoding of a `.csv`; None for UTF-8, or UTF-16 if the file begins with its mark.

    Raises:
        DataError: the file can't be read as a table, or has other than four or nine columns.
        ManifoldError: rows are no rotations within the tolerance, or reflections; the message names rows and how far they are off.

    Example:
        >>> import tempfile, numpy, torch
        >>> from divflow.manifolds import SpecialOrthogonal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.save(f"{folder}/poses.npy", SpecialOrthogonal().uniform().sample((100,)))
        ...     Rotations(f"{folder}/poses.npy").event_shape
        (3, 3)
    """

    def __init__(
        self,
        path: str | Path,
        columns: str | Sequence[str] | None = None,
        order: str = "wxyz",
        tolerance: float = 1e-3,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        context: str | Sequence[str] | None = None,
        weight: str | int | None = None,
        separator: str = ",",
        decimal: str = ".",
        thousands: str | None = None,
        encoding: str | None = None,
    ) -> None:
        found = self.read(path, columns, order, tolerance, context, weight, separator, decimal, thousands, encoding)
        super().__init__(found, batch_size, eval_batch_size, val_fraction, test_fraction, seed)

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: Names = None,
        order: str = "wxyz",
        tolerance: float = 1e-3,
        context: Names = None,
        weight: str | int | None = None,
        separator: str = ",",
        decimal: str = ".",
        thousands: str | None = None,
        encoding: str | None = None,
    ) -> PointRows:
        """Read all rotations of a file, in its order and undivided."""
        entries = RotationMatrices().names

        def coordinates(rows: Tensor, names: list[str]) -> Quaternions | RotationMatrices:
            if len(names) == 4:
                return Quaternions(order, tolerance)
            if len(names) == 9:
                return RotationMatrices(tolerance, square=Path(path).suffix.lower() == ".npy" and names == entries)
            raise DataError(
                f"rotations have four columns of quaternions or nine of matrices, but these are {len(names)}: {', '.join(names)}. Give the "
                "columns by data.columns=[...], and others as data.context=[...]"
            )

        written = TextFormat(separator, decimal, thousands, encoding)
        return read_points(path, columns, context, weight, written, lambda names: names, coordinates, entries)

"""Angles in a table, such as dihedral angles of molecules."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from divflow.data.points import Names, PointRows, Points, read_points, warn_of_radians
from divflow.data.text_format import TextFormat
from divflow.manifolds import WrappedAngles
from divflow.manifolds.coordinates import are_positive

__all__ = ["Angles"]


class Angles(Points):
    """Angles from a file, one point of a torus a row, in radians from -pi to pi.

    - **Angles of any range** are read, and wrapped.
    - **Log-densities** are in nats with respect to radians, in which the volume of the torus is (2 pi)^n. For densities per degree add
      n log(pi / 180).
    - **Samples** by the command `divflow sample` are written in the file's unit.

    Args:
        path: a `.csv`, `.parquet` or `.npy`, as for `Table`.
        columns: names of the columns of angles; all if None.
        unit: "degrees" or "radians".
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
        DataError: the file can't be read as a table.
        ManifoldError: there is no such unit.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.save(f"{folder}/dihedrals.npy", numpy.random.default_rng(0).uniform(-180, 180, size=(100, 2)))
        ...     Angles(f"{folder}/dihedrals.npy").manifold
        Torus(2, period=6.28319)
    """

    def __init__(
        self,
        path: str | Path,
        columns: str | Sequence[str] | None = None,
        unit: str = "degrees",
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
        found = self.read(path, columns, unit, context, weight, separator, decimal, thousands, encoding)
        super().__init__(found, batch_size, eval_batch_size, val_fraction, test_fraction, seed)
        warn_of_radians(found.table[:, : len(found.columns)], unit, found.file)

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: Names = None,
        unit: str = "degrees",
        context: Names = None,
        weight: str | int | None = None,
        separator: str = ",",
        decimal: str = ".",
        thousands: str | None = None,
        encoding: str | None = None,
    ) -> PointRows:
        """Read all rows of a file, in its order and undivided."""

        def coordinates(rows: Tensor, names: list[str]) -> WrappedAngles:
            return WrappedAngles(len(names), unit, positive=are_positive(rows, unit))

        written = TextFormat(separator, decimal, thousands, encoding)
        return read_points(path, columns, context, weight, written, lambda names: names, coordinates)

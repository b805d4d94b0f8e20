"""Places on the earth, or any directions: latitude and longitude in a table."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from divflow.data.module import DataError
from divflow.data.points import Names, PointRows, Points, read_points, warn_of_radians
from divflow.data.text_format import TextFormat
from divflow.manifolds import LatitudeLongitude
from divflow.manifolds.coordinates import are_positive

__all__ = ["Places"]

_LATITUDE = {"lat", "latitude"}
_LONGITUDE = {"lon", "long", "lng", "longitude"}


class Places(Points):
    """Latitudes and longitudes from a file, one place a row, as points of the unit sphere.

    - **Log-densities** are in nats with respect to the area of the unit sphere, 4 pi in all.
    - **Samples** by the command `divflow sample` are written as latitude and longitude in the file's unit.
    - **Repeated places** raise a warning, because the likelihood of the test then has no bound.

    Args:
        path: a `.csv`, `.parquet` or `.npy`, as for `Table`.
        columns: names of the two columns, the latitude first. If None, those named latitude and longitude (or lat, lon, long, lng), or the
            two of a file without names.
        unit: "degrees" or "radians".
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.
        context: names of columns that condition the density of places.
        weight: name of the column with the relative importance of each row.
        separator: separator of columns in a `.csv`.
        decimal: decimal mark of numbers in a `.csv`.
        thousands: character that groups digits of numbers in a `.csv`; None for none.
        encoding: encoding of a `.csv`; None for UTF-8, or UTF-16 if the file begins with its mark.

    Raises:
        DataError: the file can't be read as a table, it is not known which columns are meant, or they look swapped.
        ManifoldError: a latitude or a longitude is out of range; the message names rows and value.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.save(f"{folder}/places.npy", numpy.random.default_rng(0).uniform(-90, 90, size=(100, 2)))
        ...     Places(f"{folder}/places.npy").manifold
        Sphere(2)
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
        warn_of_radians(found.table[:, :2], unit, found.file)

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
        """Read all places of a file, in its order and undivided."""
        file = Path(path).name

        def usual(names: list[str]) -> list[str]:
            latitudes, longitudes = ([name for name in names if _words(name) & it] for it in (_LATITUDE, _LONGITUDE))
            if len(latitudes) == len(longitudes) == 1:
                return latitudes + longitudes
            if len(names) == 2 and all(re.fullmatch(r"f?\d", name) for name in names):
                return names
            raise DataError(
                f"{file} has the columns {', '.join(names)}, of which it is not known which are latitude and longitude. Give these two in this "
                "order, by data.columns=[latitude,longitude]"
            )

        def coordinates(rows: Tensor, names: list[str]) -> LatitudeLongitude:
            if len(names) != 2:
                raise DataError(
                    f"places have two columns, latitude and longitude, but these are {', '.join(names)}. Give two by data.columns=[...], and "
                    "others as data.context=[...]"
                )
            if _words(names[0]) & _LONGITUDE and _words(names[1]) & _LATITUDE:
                raise DataError(
                    f"the columns are {names[0]} and {names[1]}, but the latitude comes first. Give them by data.columns=[{names[1]},{names[0]}]"
                )
            return LatitudeLongitude(unit, positive=are_positive(rows[:, 1], unit))

        written = TextFormat(separator, decimal, thousands, encoding)
        return read_points(path, columns, context, weight, written, usual, coordinates)


def _words(name: str) -> set[str]:
    """The words of a name in lower case, of decimalLatitude or start_lat, too."""
    return set(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()))

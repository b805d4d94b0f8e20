"""Coordinates in which files write points of a manifold: latitude and longitude, angles, quaternions, the entries of matrices."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from divflow.errors import check_count, check_positive, listed_rows
from divflow.manifolds.manifold import Manifold, ManifoldError
from divflow.manifolds.rotations import SpecialOrthogonal, quaternion, rotation_matrix
from divflow.manifolds.sphere import Sphere
from divflow.manifolds.torus import Torus

__all__ = ["Coordinates", "LatitudeLongitude", "Quaternions", "RotationMatrices", "WrappedAngles", "are_positive"]

_TURNS = {"degrees": 360.0, "radians": 2 * math.pi}
_ORDERS = ("wxyz", "xyzw")
# Of a range, by which rounded numbers may exceed it.
_SLACK = 1e-6


class Coordinates(ABC):
    """How rows of numbers name the points of a manifold.

    A density of points keeps these beside its weights, so that its samples are written as its data were read.
    """

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Of the numbers of a row, for files without names."""

    @property
    @abstractmethod
    def manifold(self) -> Manifold:
        """The manifold of the points."""

    @abstractmethod
    def points(self, rows: Tensor) -> Tensor:
        """The points `(n, *event)` of rows `(n, columns)`.

        Raises:
            ManifoldError: rows that name no point; the message has their numbers and a value.
        """

    @abstractmethod
    def rows(self, points: Tensor) -> Tensor:
        """The rows `(n, columns)` of points `(n, *event)`."""

    def config(self) -> dict[str, Any]:
        """Plain values from which these coordinates are built again."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class LatitudeLongitude(Coordinates):
    """Places: x = (cos lat cos lon, cos lat sin lon, sin lat) on the unit sphere.

    Args:
        unit: of both, "degrees" or "radians".
        positive: whether longitudes are written from 0 to a whole turn. Otherwise they are from minus to plus half a turn. Both are read.

    Raises:
        ManifoldError: there is no such unit. By `points`, a latitude beyond a quarter of a turn, or a longitude beyond minus half a turn or a
            whole one; a message says where the two look swapped.

    Example:
        >>> LatitudeLongitude().points(torch.tensor([[30.0, 0.0]]))
        tensor([[0.8660, 0.0000, 0.5000]])
    """

    unit: str = "degrees"
    positive: bool = False

    def __post_init__(self) -> None:
        _check_unit(self.unit)

    @property
    def names(self) -> list[str]:
        """latitude, longitude."""
        return ["latitude", "longitude"]

    @property
    def manifold(self) -> Sphere:
        """`Sphere(2)`."""
        return Sphere(2)

    def points(self, rows: Tensor) -> Tensor:
        """Unit vectors `(n, 3)` of latitudes and longitudes `(n, 2)`."""
        turn = _TURNS[self.unit]
        latitude, longitude = rows.unbind(dim=1)
        slack = turn * _SLACK
        beyond = latitude.abs() > turn / 4 + slack
        if beyond.any():
            # One row beyond is a mistake in that row, whatever the longitudes are.
            swapped = int(beyond.sum()) > 1 and bool((longitude.abs() <= turn / 4 + slack).all())
            hint = (
                "the longitudes all lie within that, so that the two look swapped. The latitude comes first: correct the order, or the names in "
                "the file's header"
                if swapped
                else self._hint("correct these rows, or their order: the latitude comes first")
            )
            raise ManifoldError(
                f"latitudes must lie within {_shown(turn / 4)} {self.unit} of zero, but are up to {_furthest(latitude, beyond)} in "
                f"{listed_rows(beyond)}; {hint}"
            )
        beyond = (longitude < -turn / 2 - slack) | (longitude > turn + slack)
        if beyond.any():
            raise ManifoldError(
                f"longitudes must lie from {_shown(-turn / 2)} to {_shown(turn)} {self.unit}, but are up to {_furthest(longitude, beyond)} in "
                f"{listed_rows(beyond)}; {self._hint('correct these rows')}"
            )
        phi, theta = latitude / turn * (2 * math.pi), longitude / turn * (2 * math.pi)
        return torch.stack([phi.cos() * theta.cos(), phi.cos() * theta.sin(), phi.sin()], dim=1)

    def rows(self, points: Tensor) -> Tensor:
        """Latitudes and longitudes `(n, 2)` of unit vectors `(n, 3)`."""
        x, y, z = points.unbind(dim=1)
        angles = torch.stack([torch.atan2(z, torch.hypot(x, y)), torch.atan2(y, x)], dim=1)
        latitude, longitude = (angles * (_TURNS[self.unit] / (2 * math.pi))).unbind(dim=1)
        return torch.stack([latitude, _from(longitude, _TURNS[self.unit], self.positive)], dim=1)

    def _hint(self, otherwise: str) -> str:
        return "they may be degrees, unit=degrees" if self.unit == "radians" else otherwise


@dataclass(frozen=True)
class WrappedAngles(Coordinates):
    """Angles of any range, as points of a torus in radians from -pi to pi.

    Args:
        count: how many angles a row has.
        unit: "degrees" or "radians".
        positive: whether they are written from 0 to a whole turn. Otherwise they are from minus to plus half a turn. All are read.

    Raises:
        ManifoldError: there is no such unit.
        ValueError: the count is not a positive whole number.

    Example:
        >>> WrappedAngles(2).points(torch.tensor([[90.0, 450.0]]))
        tensor([[1.5708, 1.5708]])
    """

    count: int
    unit: str = "degrees"
    positive: bool = False

    def __post_init__(self) -> None:
        check_count("count", self.count)
        _check_unit(self.unit)

    @property
    def names(self) -> list[str]:
        """angle1, angle2, ..."""
        return [f"angle{i + 1}" for i in range(self.count)]

    @property
    def manifold(self) -> Torus:
        """`Torus(count)`."""
        return Torus(self.count)

    def points(self, rows: Tensor) -> Tensor:
        """Radians `(n, count)` from -pi to pi."""
        turn = _TURNS[self.unit]
        # Wrapped in the file's unit first, in which whole turns of degrees are exact.
        return _from(rows, turn, positive=False) * (2 * math.pi / turn)

    def rows(self, points: Tensor) -> Tensor:
        """Angles `(n, count)` in the unit."""
        turn = _TURNS[self.unit]
        return _from(points * (turn / (2 * math.pi)), turn, self.positive)


@dataclass(frozen=True)
class Quaternions(Coordinates):
    """Rotations as unit quaternions, of which q and -q are the same; they are written with a real part that is not negative.

    Args:
        order: "wxyz" with the real part first, or "xyzw" with it last, as SciPy has them.
        tolerance: how far from 1 a norm may be. Quaternions within it are divided by their norm.

    Raises:
        ManifoldError: there is no such order; by `points`, norms beyond the tolerance.
        ValueError: the tolerance is not positive.

    Example:
        >>> Quaternions("xyzw").points(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))[0]
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """

    order: str = "wxyz"
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise ManifoldError(f"order must be {' or '.join(_ORDERS)}, but is {self.order!r}")
        check_positive("tolerance", self.tolerance)

    @property
    def names(self) -> list[str]:
        """The letters of the order, such as qw."""
        return [f"q{letter}" for letter in self.order]

    @property
    def manifold(self) -> SpecialOrthogonal:
        """`SpecialOrthogonal()`."""
        return SpecialOrthogonal()

    def points(self, rows: Tensor) -> Tensor:
        """Rotation matrices `(n, 3, 3)` of quaternions `(n, 4)`."""
        norm = torch.linalg.vector_norm(rows, dim=1)
        bad = (norm - 1).abs() > self.tolerance
        if bad.any():
            raise ManifoldError(
                f"quaternions must have norm 1 within {self.tolerance:g}, but the norm is {_furthest(norm, bad, 1.0)} in {listed_rows(bad)}; "
                "correct these rows, or raise tolerance if they are only rounded"
            )
        q = rows / norm[:, None]
        return rotation_matrix(q if self.order == "wxyz" else q.roll(1, dims=1))

    def rows(self, points: Tensor) -> Tensor:
        """Quaternions `(n, 4)` of rotation matrices `(n, 3, 3)`."""
        q = quaternion(points)
        return q if self.order == "wxyz" else q.roll(-1, dims=1)


@dataclass(frozen=True)
class RotationMatrices(Coordinates):
    """Rotations as the nine entries of their matrices, row by row.

    Args:
        tolerance: how far an entry may be from that of the closest rotation, which is taken instead.
        square: whether they are written as matrices `(n, 3, 3)`, as arrays may have them. Both are read.

    Raises:
        ManifoldError: by `points`, matrices of negative determinant, or farther than the tolerance from a rotation.
        ValueError: the tolerance is not positive.
    """

    tolerance: float = 1e-3
    square: bool = False

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)

    @property
    def names(self) -> list[str]:
        """r11, r12, r13, r21, ..."""
        return [f"r{i}{j}" for i in (1, 2, 3) for j in (1, 2, 3)]

    @property
    def manifold(self) -> SpecialOrthogonal:
        """`SpecialOrthogonal()`."""
        return SpecialOrthogonal()

    def points(self, rows: Tensor) -> Tensor:
        """The closest rotation matrices `(n, 3, 3)` to rows `(n, 9)` or `(n, 3, 3)`."""
        matrices = rows.reshape(-1, 3, 3)
        determinant = torch.linalg.det(matrices)
        reflected = determinant < 0
        if reflected.any():
            raise ManifoldError(
                f"rotations must have determinant 1, but it is {_furthest(determinant, reflected, 1.0)} in {listed_rows(reflected)}, as of "
                "reflections; where the axes are left-handed, negate one of them"
            )
        closest = self.manifold.project(matrices)
        off = (matrices - closest).abs().flatten(1).amax(dim=1).nan_to_num(math.inf)
        bad = off > self.tolerance
        if bad.any():
            raise ManifoldError(
                f"matrices must be orthogonal within {self.tolerance:g}, but entries are off by {_furthest(off, bad)} in {listed_rows(bad)}; "
                "correct these rows, or raise tolerance if they are only rounded"
            )
        return closest

    def rows(self, points: Tensor) -> Tensor:
        """The nine entries, `(n, 9)`, or as they are."""
        return points if self.square else points.flatten(1)


def are_positive(angles: Tensor, unit: str) -> bool:
    """Whether angles are written from 0 to a whole turn: none is negative, and some are beyond half a turn.

    Raises:
        ManifoldError: there is no such unit.
    """
    _check_unit(unit)
    return bool((angles >= 0).all() & (angles > _TURNS[unit] * (0.5 + _SLACK)).any())


def _check_unit(unit: str) -> None:
    if unit not in _TURNS:
        raise ManifoldError(f"unit must be {' or '.join(_TURNS)}, but is {unit!r}")


def _from(angles: Tensor, turn: float, positive: bool) -> Tensor:
    """Angles within a turn from zero, or about it."""
    start = 0.0 if positive else -turn / 2
    within = angles - turn * torch.floor((angles - start) / turn)
    # A tiny negative angle is rounded up to the whole turn, which is the start.
    return torch.where(within >= start + turn, start, within)


def _furthest(values: Tensor, bad: Tensor, centre: float = 0.0) -> str:
    """The value that is farthest from a centre, among the bad ones."""
    found = values[bad]
    return f"{found[(found - centre).abs().argmax()].item():.6g}"


def _shown(number: float) -> str:
    return f"{number:.6g}"

"""Rows of files name points and come back; what names none is refused with its row, its value and the remedy."""

import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy.spatial.transform import Rotation

from divflow.manifolds import LatitudeLongitude, ManifoldError, Quaternions, RotationMatrices, WrappedAngles

HALF = math.pi / 2


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def rotations(count=40):
    torch.manual_seed(0)
    return Rotation.from_quat(torch.randn(count, 4, dtype=torch.float64).numpy())


def test_places_are_where_a_globe_has_them():
    found = LatitudeLongitude().points(doubles([0, 0], [0, 90], [0, -90], [90, 17], [-90, 3], [30, 180]))
    wanted = doubles([1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [-math.sqrt(3) / 2, 0, 0.5])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)
    torch.testing.assert_close(LatitudeLongitude("radians").points(doubles([0, HALF])), wanted[1:2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("unit", ["degrees", "radians"])
@pytest.mark.parametrize("positive", [False, True])
def test_places_come_back_as_they_were_read(unit, positive):
    turn = 360 if unit == "degrees" else 2 * math.pi
    torch.manual_seed(0)
    u, v = torch.rand(2, 500, dtype=torch.float64)
    rows = turn * torch.stack([(u - 0.5) / 2, v if positive else v - 0.5], dim=1)
    coordinates = LatitudeLongitude(unit, positive)
    points = coordinates.points(rows)
    coordinates.manifold.check(points)
    torch.testing.assert_close(coordinates.rows(points), rows, rtol=0, atol=1e-13 * turn)
    other = LatitudeLongitude(unit, not positive).rows(points)
    torch.testing.assert_close(coordinates.points(other), points, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("unit", "row", "message"),
    [
        (
            "degrees",
            [90.5, 10],
            r"latitudes.*within 90 degrees.*90\.5 in row 1 of 2.*correct these rows, or their order",
        ),
        ("degrees", [-91, 170], r"-91 in row 1 of 2.*correct these rows"),
        ("degrees", [0, 361], r"longitudes.*from -180 to 360 degrees.*361 in row 1 of 2"),
        ("degrees", [0, -180.1], r"-180\.1 in row 1"),
        ("radians", [45, 10], r"within 1\.5708 radians.*45 in row 1 of 2.*unit=degrees"),
        ("radians", [0, 10], r"10 in row 1 of 2.*unit=degrees"),
    ],
)
def test_no_places(unit, row, message):
    with pytest.raises(ManifoldError, match=message):
        LatitudeLongitude(unit).points(doubles([0, 0], row))


def test_the_ends_of_the_ranges_are_places_when_they_are_rounded():
    LatitudeLongitude().points(doubles([90, 360], [-90, -180]))
    LatitudeLongitude("radians").points(doubles([1.570797, 6.283186], [-1.570797, -3.141593]))


@pytest.mark.parametrize("unit", ["degrees", "radians"])
def test_angles_are_wrapped_and_come_back(unit):
    turn = 360 if unit == "degrees" else 2 * math.pi
    rows = turn * doubles([0.5, -0.5, 0.25], [1.25, -1.25, 7.0])
    points = WrappedAngles(3, unit).points(rows)
    quarter = math.pi / 2
    torch.testing.assert_close(points, quarter * doubles([-2, -2, 1], [1, -1, 0]), rtol=0, atol=1e-14)
    back = turn / 4 * doubles([-2, -2, 1], [1, -1, 0])
    torch.testing.assert_close(WrappedAngles(3, unit).rows(points), back, rtol=0, atol=1e-14 * turn)
    positive = turn / 4 * doubles([2, 2, 1], [1, 3, 0])
    torch.testing.assert_close(WrappedAngles(3, unit, positive=True).rows(points), positive, rtol=0, atol=1e-14 * turn)


def test_a_rounded_angle_stays_below_the_turn():
    assert WrappedAngles(1, positive=True).rows(doubles([-1e-300])).item() == 0


def test_quaternions_are_those_of_scipy():
    truth = rotations()
    for order, quaternions in {
        "xyzw": truth.as_quat(canonical=True),
        "wxyz": np.roll(truth.as_quat(canonical=True), 1, 1),
    }.items():
        rows = torch.from_numpy(quaternions)
        points = Quaternions(order).points(rows)
        np.testing.assert_allclose(points, truth.as_matrix(), atol=1e-14)
        np.testing.assert_allclose(Quaternions(order).rows(points), rows, atol=1e-14)
        torch.testing.assert_close(Quaternions(order).points(-rows), points)


def test_rounded_rotations_are_projected_and_others_refused():
    truth = rotations()
    for coordinates, exact in {
        Quaternions("xyzw", tolerance=2e-3): truth.as_quat(),
        RotationMatrices(tolerance=2e-3): truth.as_matrix().reshape(-1, 9),
    }.items():
        rounded = torch.from_numpy(exact.round(3))
        points = coordinates.points(rounded)
        coordinates.manifold.check(points)
        np.testing.assert_allclose(points, truth.as_matrix(), atol=3e-3)
        rounded[7] *= 1.01
        with pytest.raises(ManifoldError, match=r"within 0\.002.* in row 7 of 40.*raise tolerance"):
            coordinates.points(rounded)


def test_how_far_a_norm_and_an_entry_are_off_is_reported():
    with pytest.raises(ManifoldError, match=r"the norm is 1\.5 in row 0, 1 of 2"):
        Quaternions().points(doubles([1.2, 0, 0, 0], [0, 0, 1.5, 0]))
    with pytest.raises(ManifoldError, match=r"off by 0\.25 in row 0"):
        RotationMatrices().points(doubles([1.25, 0, 0, 0, 1, 0, 0, 0, 1]))
    with pytest.raises(ManifoldError, match=r"off by inf in row 0"):
        RotationMatrices().points(torch.zeros(1, 9))


def test_reflections_are_refused():
    rows = torch.eye(3, dtype=torch.float64).flatten().repeat(3, 1)
    rows[2, 8] = -1
    with pytest.raises(ManifoldError, match=r"determinant 1, but it is -1 in row 2 of 3.*left-handed.*negate"):
        RotationMatrices().points(rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatitudeLongitude("grad"), "unit must be degrees or radians, but is 'grad'"),
        (lambda: WrappedAngles(2, "deg"), "unit must be degrees or radians, but is 'deg'"),
        (lambda: WrappedAngles(0), "count.*0"),
        (lambda: Quaternions("ijkl"), "order must be wxyz or xyzw, but is 'ijkl'"),
        (lambda: Quaternions(tolerance=0.0), "tolerance"),
        (lambda: RotationMatrices(tolerance=-1.0), "tolerance"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "coordinates",
    [LatitudeLongitude("radians", True), WrappedAngles(3, "radians"), Quaternions("xyzw"), RotationMatrices(0.1)],
)
def test_plain_values_build_them_again(coordinates):
    assert instantiate(coordinates.config()) == coordinates
    width = len(coordinates.names)
    shape = coordinates.manifold.event_shape
    assert coordinates.rows(coordinates.manifold.uniform().sample((5,))).shape == (5, width)
    assert coordinates.points(coordinates.rows(coordinates.manifold.uniform().sample((5,)))).shape == (5, *shape)

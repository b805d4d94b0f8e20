"""Places, angles and rotations of files: points of their manifolds, by the checks and in the splits that tables have."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from divflow.data import Angles, DataError, Places, Rotations
from divflow.data.batch import parts_of
from divflow.manifolds import ManifoldError, SpecialOrthogonal, Sphere, Torus

RANDOM = np.random.default_rng(0)
PLACES = np.stack([RANDOM.uniform(-90, 90, 60), RANDOM.uniform(-180, 180, 60)], axis=1).round(3)
TRUTH = Rotation.from_quat(RANDOM.normal(size=(60, 4)))


def write(folder, header, rows, name="t.csv"):
    lines = [",".join(map(repr, row)) for row in np.asarray(rows).tolist()]
    (folder / name).write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return folder / name


def points(data):
    """All of a module's points, in the order of its file."""
    parts = [data.train, data.val, data.test]
    return torch.cat([it.rows for it in parts])[torch.cat([it.numbers for it in parts]).argsort()]


def on_globe(latitude, longitude):
    a, b = np.deg2rad(latitude), np.deg2rad(longitude)
    return np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], axis=1)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "# a source of https://a.b",
        "lat,long",
        "Latitude,Longitude",
        "LAT,LON",
        "decimalLatitude,decimalLongitude",
        "start_lat,start_lng",
    ],
)
def test_places_of_a_file(tmp_path, header):
    data = Places(write(tmp_path, header, PLACES), batch_size=16)
    assert data.columns == (header.split(",") if "," in header else ["f0", "f1"])
    assert (data.event_shape, repr(data.manifold), data.context_features) == ((3,), repr(Sphere(2)), 0)
    np.testing.assert_allclose(points(data), on_globe(*PLACES.T), atol=1e-14)
    assert [len(it) for it in (data.train, data.val, data.test)] == [48, 6, 6]
    batch = next(iter(data.train_dataloader()))
    data.manifold.check(batch)
    y, log_det = data.transform(batch)
    assert torch.equal(y, batch)
    assert torch.equal(log_det, torch.zeros(16, dtype=log_det.dtype))
    torch.testing.assert_close(data.coordinates.rows(points(data)), torch.from_numpy(PLACES))


def test_columns_are_found_among_others_and_may_be_named(tmp_path):
    others = np.c_[RANDOM.normal(size=60), PLACES[:, ::-1], RANDOM.normal(size=60)]
    path = write(tmp_path, "depth,lon,lat,size", others)
    for data in (Places(path), Places(path, columns=["lat", "lon"])):
        assert data.columns == ["lat", "lon"]
        np.testing.assert_allclose(points(data), on_globe(*PLACES.T), atol=1e-14)
    data = (
        Places(path, context=["depth"], weight="size") if (others[:, 3] >= 0).all() else Places(path, context=["depth"])
    )
    x, context, _ = parts_of(data.train.__getitems__([0, 1, 2]))
    np.testing.assert_allclose(context[:, 0], others[data.train.numbers[:3], 0])
    np.testing.assert_allclose(x, on_globe(*PLACES[data.train.numbers[:3]].T), atol=1e-14)
    assert (data.context_columns, data.context_features) == (["depth"], 1)
    seen = data.context_transform(data.train.context)[0]
    assert abs(seen.mean()) < 1e-12
    assert seen.std().item() == pytest.approx(1)


def test_weights_of_places(tmp_path):
    weights = np.arange(60.0)
    data = Places(write(tmp_path, "lat,lon,w", np.c_[PLACES, weights]), weight="w")
    np.testing.assert_array_equal(data.test.weight, weights[data.test.numbers])


def test_radians_and_positive_longitudes_come_back_as_they_are(tmp_path):
    data = Places(write(tmp_path, "lat,lon", np.deg2rad(PLACES)), unit="radians")
    np.testing.assert_allclose(points(data), on_globe(*PLACES.T), atol=1e-14)
    positive = np.c_[PLACES[:, 0], PLACES[:, 1] % 360]
    data = Places(write(tmp_path, "lat,lon", positive))
    np.testing.assert_allclose(points(data), on_globe(*PLACES.T), atol=1e-14)
    np.testing.assert_allclose(data.coordinates.rows(points(data)), positive)


def changed(row, column, value):
    rows = PLACES.copy()
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("header", "rows", "settings", "error", "message"),
    [
        ("a,b", PLACES, {}, DataError, r"columns a, b, of which it is not known.*data\.columns=\[latitude,longitude\]"),
        ("", np.c_[PLACES, PLACES[:, 0]], {}, DataError, r"columns f0, f1, f2, of which"),
        ("lat,lon", PLACES, {"columns": ["lon", "lat"]}, DataError, r"are lon and lat.*data\.columns=\[lat,lon\]"),
        (
            "lat,lon",
            PLACES,
            {"columns": ["lat"]},
            DataError,
            r"two columns, latitude and longitude, but these are lat\.",
        ),
        (
            "a,b",
            np.clip(PLACES[:, ::-1], -170, 85),
            {"columns": ["a", "b"]},
            ManifoldError,
            r"the two look swapped.*names in the file's header",
        ),
        ("lat,lon", changed(7, 0, 90.5), {}, ManifoldError, r"latitudes.*90\.5 in row 7 of 60, counted from 0"),
        ("lat,lon", changed(7, 1, 360.5), {}, ManifoldError, r"longitudes.*360\.5 in row 7 of 60"),
        ("lat,lon", changed(7, 1, math.nan), {}, DataError, r"not finite: row 7.*column lon"),
        ("lat,lon", PLACES, {"unit": "radians"}, ManifoldError, r"unit=degrees"),
        ("lat,lon", PLACES, {"unit": "deg"}, ManifoldError, r"unit must be degrees or radians, but is 'deg'"),
        ("lat,lon", PLACES, {"context": ["c"]}, DataError, r"no column c"),
        ("lat,lon", PLACES[:5], {}, DataError, r"5 rows are too few"),
    ],
)
def test_what_are_no_places(tmp_path, header, rows, settings, error, message):
    with pytest.raises(error, match=message):
        Places(write(tmp_path, header, rows), **settings)


def test_repeated_places_and_small_degrees_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"20 of the 80 rows of t\.csv repeat another one.*likelihood has no bound"):
        Places(write(tmp_path, "lat,lon", np.r_[PLACES, PLACES[:20]]))
    with pytest.warns(UserWarning, match=r"lie within 3\.11 of zero, as radians do.*data\.unit=radians"):
        Places(write(tmp_path, "lat,lon", np.deg2rad(PLACES)))
    with pytest.warns(UserWarning, match=r"as radians do"):
        Angles(write(tmp_path, "phi,psi", np.deg2rad(PLACES)))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("unit", ["degrees", "radians"])
def test_angles_of_a_file(tmp_path, count, unit):
    turn = 360 if unit == "degrees" else 2 * math.pi
    angles = RANDOM.uniform(-2 * turn, 2 * turn, (60, count))
    names = list("abcde"[:count])
    data = Angles(write(tmp_path, ",".join(names), angles), unit=unit)
    assert (repr(data.manifold), data.event_shape, data.columns) == (repr(Torus(count)), (count,), names)
    found = points(data).numpy()
    assert (found >= -math.pi).all()
    assert (found < math.pi).all()
    np.testing.assert_allclose(np.exp(1j * found), np.exp(2j * math.pi * angles / turn), atol=1e-12)
    back = data.coordinates.rows(points(data)).numpy()
    np.testing.assert_allclose(back, (angles + turn / 2) % turn - turn / 2, atol=1e-10)


def test_some_angles_of_a_table(tmp_path):
    data = Angles(write(tmp_path, "x,phi,psi", np.c_[PLACES[:, 0], PLACES]), columns=["psi", "phi"], context="x")
    np.testing.assert_allclose(points(data), np.deg2rad(PLACES[:, ::-1]))
    np.testing.assert_array_equal(data.test.context[:, 0], PLACES[data.test.numbers, 0])
    assert Angles(write(tmp_path, "phi,psi", PLACES % 360)).coordinates.positive


QUATERNIONS = TRUTH.as_quat(canonical=True)
ROTATIONS = {
    "wxyz.csv": (np.roll(QUATERNIONS, 1, axis=1), {}),
    "xyzw.csv": (QUATERNIONS, {"order": "xyzw"}),
    "xyzw.npy": (QUATERNIONS, {"order": "xyzw"}),
    "nine.csv": (TRUTH.as_matrix().reshape(-1, 9), {}),
    "nine.npy": (TRUTH.as_matrix().reshape(-1, 9), {}),
    "matrices.npy": (TRUTH.as_matrix(), {}),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_of_a_file(tmp_path, name):
    rows, settings = ROTATIONS[name]
    if name.endswith(".npy"):
        np.save(tmp_path / name, rows)
    else:
        write(tmp_path, "", rows, name)
    data = Rotations(tmp_path / name, **settings)
    assert (repr(data.manifold), data.event_shape) == (repr(SpecialOrthogonal()), (3, 3))
    np.testing.assert_allclose(points(data), TRUTH.as_matrix(), atol=1e-14)
    np.testing.assert_allclose(data.coordinates.rows(points(data)), rows, atol=1e-14)
    assert len(data.columns) == rows[0].size
    y, log_det = data.transform(points(data))
    assert torch.equal(y, points(data))
    assert torch.equal(log_det, torch.zeros(60, dtype=log_det.dtype))


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (
            lambda q: 1.1 * q,
            {},
            ManifoldError,
            r"norm 1 within 0\.001, but the norm is 1\.1 in row 0, 1.*and 50 more of 60",
        ),
        (
            lambda q: q[:, :3],
            {},
            DataError,
            r"four columns of quaternions or nine of matrices, but these are 3: f0, f1, f2",
        ),
        (lambda q: q, {"order": "zyxw"}, ManifoldError, r"order must be wxyz or xyzw, but is 'zyxw'"),
        (lambda q: q, {"tolerance": 0}, ValueError, r"tolerance.*0"),
        (
            lambda q: -Rotation.from_quat(q).as_matrix().reshape(-1, 9),
            {},
            ManifoldError,
            r"determinant 1, but it is -1 in row 0",
        ),
        (
            lambda q: 1.01 * Rotation.from_quat(q).as_matrix().reshape(-1, 9),
            {},
            ManifoldError,
            r"orthogonal within 0\.001.* off by 0\.00",
        ),
    ],
)
def test_what_are_no_rotations(tmp_path, change, settings, error, message):
    with pytest.raises(error, match=message):
        Rotations(write(tmp_path, "", change(QUATERNIONS)), **settings)


def test_a_tolerance_takes_rounded_rotations(tmp_path):
    data = Rotations(write(tmp_path, "", QUATERNIONS.round(2)), order="xyzw", tolerance=0.02)
    data.manifold.check(points(data))
    assert data.manifold.distance(points(data), torch.from_numpy(TRUTH.as_matrix())).max() < 0.03


def test_all_rows_are_those_of_the_file_in_its_order(tmp_path):
    path = write(tmp_path, "lat,lon,c", np.c_[PLACES, PLACES[:, 0]])
    settings = {"path": path, "columns": ["lat", "lon"], "context": ["c"], "batch_size": 7, "seed": 3}
    rows, digests = Places.all_rows(**settings)
    np.testing.assert_allclose(rows.rows, on_globe(*PLACES.T), atol=1e-14)
    assert torch.equal(digests, Places(**settings).state_dict()["digests"])
    one, _ = Places.all_rows(path=write(tmp_path, "lat,lon", PLACES[:1], "one.csv"))  # too few to split
    assert len(one) == 1
    with pytest.raises(DataError, match=r"Places has no setting bounds\. Choose from path, columns, unit"):
        Places.all_rows(path=path, bounds=None)


def test_a_resumed_run_has_its_columns_and_split(tmp_path):
    path = write(tmp_path, "lat,lon", PLACES)
    state = Places(path).state_dict()
    again = Places(path, seed=1)
    with pytest.warns(UserWarning, match="the split is that of the training"):
        again.load_state_dict(state)
    assert torch.equal(again.test.numbers, Places(path).test.numbers)
    with pytest.raises(DataError, match=r"trained on the columns lat, lon, but these are f0, f1"):
        Places(write(tmp_path, "", PLACES)).load_state_dict(state)

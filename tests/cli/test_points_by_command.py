"""Places, angles and rotations by the commands: samples in the terms of the file, and new files by the same checks."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run import FAST, config
from scipy.spatial.transform import Rotation
from torch import nn

import divflow
from divflow.cli import main
from divflow.errors import FieldError
from divflow.manifolds import LatitudeLongitude, WrappedAngles
from divflow.runs.experiment import train

RANDOM = np.random.default_rng(0)
PLACES = np.stack([RANDOM.uniform(-90, 90, 60), RANDOM.uniform(0, 360, 60)], axis=1).round(2)
QUATERNIONS = Rotation.from_quat(RANDOM.normal(size=(60, 4))).as_quat(canonical=True)
PERIODIC = f"{__name__}.Periodic"
DATA = {
    "places": (["data=sphere", "data.context=[depth]"], "depth,lon,lat", np.c_[PLACES[:, 0], PLACES[:, ::-1]]),
    "angles": (
        ["data=torus", "data.unit=radians", "features=none", "network=custom", f"network._target_={PERIODIC}"],
        "phi,psi",
        np.deg2rad(PLACES - 180),
    ),
    "poses": (["data=rotations", "data.order=xyzw"], "a,b,c,d", QUATERNIONS),
}


class Periodic(nn.Module):
    """A velocity that is a function of angles."""

    def __init__(self, event_shape):
        super().__init__()
        self.net = nn.Linear(2 * event_shape[0] + 1, event_shape[0])

    def forward(self, t, x):
        return self.net(torch.cat([x.cos(), x.sin(), t.reshape(-1, 1).expand(len(x), 1)], dim=1))


def write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in np.asarray(rows).tolist())]) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            settings, header, rows = DATA[name]
            write(folder / "t.csv", header, rows)
            fast = [it for it in FAST if name != "angles" or not it.startswith("network")]
            train(config(*fast, *settings, f"data.path={folder / 't.csv'}", f"output_dir={folder}"))
            made[name] = folder / "checkpoints" / "best.ckpt"
        return made[name]

    return run


def read(path):
    with open(path, newline="") as file:
        names, *rows = csv.reader(file)
    return names, np.array(rows, dtype=float)


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value.code).startswith("error: ")
    return str(stopped.value.code)


def drawn(best, *settings, suffix="csv"):
    given = [f"allow=[{PERIODIC}]", "num_samples=40", "seed=3", "overwrite=true", *settings]
    main(["sample", f"ckpt_path={best}", f"out=s.{suffix}", *given])
    return read("s.csv") if suffix == "csv" else np.load("s.npy")


def test_places_are_written_as_latitude_and_longitude(runs, tmp_path, monkeypatch):
    best = runs("places")
    monkeypatch.chdir(tmp_path)
    names, rows = drawn(best, "context=[10]")
    assert names == ["lat", "lon"]  # not those of the context
    assert (np.abs(rows[:, 0]) <= 90).all()
    assert (rows[:, 1] >= 0).all()
    assert (rows[:, 1] < 360).all()
    assert rows[:, 1].max() > 180
    np.testing.assert_array_equal(drawn(best, "context=[10]", suffix="npy"), rows)
    density = divflow.load(best)
    assert density.coordinates == LatitudeLongitude("degrees", positive=True)
    noise = density.flow.sample_base(40, torch.Generator().manual_seed(3))
    points = density.flow.decode(noise, density.flow_context(torch.full((40, 1), 10.0)))
    np.testing.assert_allclose(rows, density.coordinates.rows(points.detach()), atol=2e-3)


def test_a_new_file_of_places_is_read_by_the_same_columns_and_checks(runs, tmp_path, monkeypatch):
    best = runs("places")
    monkeypatch.chdir(tmp_path)
    given = np.c_[PLACES[:3, 1], PLACES[:3, 0], np.arange(3), [0.5, 1.5, 2.5]]
    write(Path("new.csv"), "lon,lat,other,depth", given)
    main(["evaluate", f"ckpt_path={best}", "+data.path=new.csv", "split=all", "out=new.npy"])
    density = divflow.load(best)
    x = density.coordinates.points(torch.from_numpy(PLACES[:3]))
    with pytest.raises(FieldError, match=r"points of Sphere\(2\).*density\.coordinates\.points"):
        density.log_prob(torch.from_numpy(PLACES[:3]))
    expected = density.log_prob(x, torch.tensor([[0.5], [1.5], [2.5]])).detach()
    np.testing.assert_allclose(np.load("new.npy")[:, 0], expected, rtol=1e-4)
    given[2, 1] = 95.0
    write(Path("new.csv"), "lon,lat,other,depth", given)
    again = ["evaluate", f"ckpt_path={best}", "+data.path=new.csv", "split=all", "out=none.npy"]
    assert "95 in row 2 of 3, counted from 0" in refused(*again)
    write(Path("new.csv"), "lon,lat", given[:, :2])
    assert "new.csv has no column depth" in refused(*again)


def test_changed_places_are_warned_of(runs, tmp_path, monkeypatch):
    best = runs("places")
    monkeypatch.chdir(tmp_path)
    file = best.parents[1] / "t.csv"
    before = file.read_text()
    try:
        file.write_text("".join(before.splitlines(keepends=True)[:-2]))
        with pytest.warns(UserWarning, match="the data have 58 rows, and had 60"):
            main(["evaluate", f"ckpt_path={best}", "split=all", "out=changed.npy"])
        with pytest.warns(UserWarning, match="the data have 58 rows, and had 60"):
            drawn(best, "context=[10]")
    finally:
        file.write_text(before)


def test_angles_are_written_in_their_unit(runs, tmp_path, monkeypatch):
    best = runs("angles")
    monkeypatch.chdir(tmp_path)
    names, rows = drawn(best)
    assert names == ["phi", "psi"]
    assert (np.abs(rows) <= math.pi).all()
    assert divflow.load(best, allow=[Periodic]).coordinates == WrappedAngles(2, "radians")


def test_rotations_are_written_as_they_were_read(runs, tmp_path, monkeypatch):
    best = runs("poses")
    monkeypatch.chdir(tmp_path)
    names, rows = drawn(best)
    assert names == ["a", "b", "c", "d"]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert (rows[:, 3] >= 0).all()  # the real part, which is last


@pytest.mark.parametrize("name", DATA)
def test_a_figure_of_samples(runs, name, tmp_path, monkeypatch):
    best = runs(name)
    monkeypatch.chdir(tmp_path)
    if name == "places":  # of all contexts
        assert "given" in refused("sample", f"ckpt_path={best}", "num_samples=9", "out=s.png")
        return
    main(["sample", f"ckpt_path={best}", f"allow=[{PERIODIC}]", "num_samples=20", "out=s.png"])
    with Image.open("s.png") as picture:
        assert picture.size[0] > 600

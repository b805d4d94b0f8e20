"""Tables by the commands, as a user types them: grown since their training, with a context, with whole numbers, beyond bounds."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run import FAST, config, run_here
from scipy.stats import norm

import divflow
from divflow.cli import main
from divflow.data.split import split_numbers
from divflow.flow.units import UnitsWarning
from divflow.runs.experiment import train
from divflow.runs.settings import check_settings
from divflow.saved.build import ConfigError

VALUES = np.random.default_rng(0).normal([3.0, -2.0], [2.0, 0.5], (100, 2))
BEST = "ckpt_path=run/checkpoints/best.ckpt"


def write(rows, path="t.csv", names="a,b"):
    lines = [names, *(",".join(map(repr, row)) for row in np.asarray(rows).tolist())]
    Path(path).write_text("\n".join(lines) + "\n")


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value.code).startswith("error: ")
    return str(stopped.value.code)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write(VALUES, folder / "t.csv")
    train(config(*FAST, "data=table", f"data.path={folder / 't.csv'}", f"output_dir={folder / 'run'}"))
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A run and its table, in a folder of this test's own."""
    monkeypatch.chdir(tmp_path)
    write(VALUES)
    shutil.copytree(trained / "run", "run")
    saved = Path("run/config.yaml")
    saved.write_text(saved.read_text().replace(str(trained / "t.csv"), str(tmp_path / "t.csv")))
    return tmp_path


def test_a_grown_table_is_tested_on_the_rows_that_training_held_out(here):
    main(["evaluate", BEST, "out=before.csv"])
    write(np.concatenate([VALUES, VALUES[:60] + 1]))
    said = "160 rows, and had 100 when the density was trained: 100 of those are still here, 0 are gone or changed, and 60 are new"
    with pytest.warns(UserWarning, match=said):
        main(["evaluate", BEST, "out=after.csv"])
    assert read("after.csv") == read("before.csv")
    trained_rows = set(split_numbers(100, 0.1, 0.1, 0)[2].tolist())
    held_out = {int(row["row"]) for row in read("after.csv")}
    assert held_out == trained_rows
    with pytest.warns(UserWarning, match=said):
        main(["evaluate", BEST, "split=all", "out=all.csv"])
    every = read("all.csv")
    assert [int(row["row"]) for row in every] == list(range(160))
    for row in read("before.csv"):
        assert float(every[int(row["row"])]["log_prob"]) == pytest.approx(float(row["log_prob"]), rel=1e-5)
    with pytest.warns(UserWarning, match=said):
        main(["sample", BEST, "num_samples=20"])


def test_all_rows_of_a_new_file_are_evaluated(here, capsys):
    """As few as they are; a split of it that is asked for is shown as a part of it."""
    write(VALUES[:5] + 1, "new.csv")
    new = [BEST, "data=table", "data.path=new.csv"]
    main(["evaluate", *new, "out=five.csv"])
    assert [row["row"] for row in read("five.csv")] == list("01234")
    said = capsys.readouterr().out
    assert re.search(r"no row of \S*new\.csv was trained on, so all of them are evaluated", said)
    assert "5 rows, split all" in said
    write(VALUES[:30] + 1, "new.csv")
    main(["evaluate", *new, "split=test", "out=three.csv"])
    said = capsys.readouterr().out
    assert re.search(r"3 of 30 rows, split\s+test", said)
    assert "To evaluate all 30 rows, add split=all" in said
    write(np.concatenate([VALUES, VALUES[:30] + 1]), "new.csv")
    with pytest.warns(UserWarning, match="30 are new"):
        main(["evaluate", *new, "out=held.csv"])
    assert len(read("held.csv")) == 10


@pytest.mark.slow
def test_a_figure_shows_rows_that_training_held_out(here):
    write(np.concatenate([VALUES, VALUES[:60] + 1]))
    with pytest.warns(UserWarning, match="160 rows, and had 100"):
        main(["sample", BEST, "num_samples=20", "out=s.png"])


@pytest.mark.slow
def test_a_run_goes_on_with_the_rows_of_its_training_alone(here):
    """To the same weights, bit for bit."""
    more = [
        *FAST,
        "data=table",
        f"data.path={here / 't.csv'}",
        "ckpt_path=run/checkpoints/last.ckpt",
        "trainer.max_steps=8",
        "task.scheduler.T_max=4",
    ]
    run_here(*more, "output_dir=plain")
    write(np.concatenate([VALUES, VALUES[:60] + 1]))
    with pytest.warns(UserWarning, match="160 rows, and had 100"):
        run_here(*more, "output_dir=grown")
    states = [torch.load(f"{it}/checkpoints/last.ckpt", weights_only=True) for it in ("plain", "grown")]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    plain, grown = (json.loads(Path(it, "results.json").read_text())["metrics"] for it in ("plain", "grown"))
    assert plain == grown
    with pytest.warns(UserWarning, match="160 rows, and had 100"):  # not the 160 that the second run has seen
        main(["evaluate", "ckpt_path=grown/checkpoints/last.ckpt", "out=after.csv"])
    assert len(read("after.csv")) == 10


def test_a_run_of_other_columns_does_not_go_on(here):
    write(VALUES, "other.csv", "a,c")
    with pytest.raises(SystemExit, match="trained on the columns a, b, but these are a, c"):
        run_here(*FAST, "data=table", "data.path=other.csv", "ckpt_path=run/checkpoints/last.ckpt", "output_dir=other")
    assert not Path("other").exists()


def test_data_that_are_named_may_be_others(here):
    """Without a word."""
    write(VALUES + 0.1, "other.csv")
    main(["evaluate", BEST, "+data.path=other.csv", "out=other.npy"])
    write(np.concatenate([VALUES[:50], VALUES[:50] + 0.1]), "half.csv")
    with pytest.warns(UserWarning, match="50 of those are still here, 50 are gone"):
        main(["evaluate", BEST, "data=table", "data.path=half.csv", "out=half.npy"])


def write_conditional(count):
    """Of a = 2 b + noise."""
    generator = np.random.default_rng(0)
    given = generator.normal(10.0, 3.0, count)
    write(np.stack([given, 2 * given + generator.normal(0, 1.0, count)], axis=1), names="b,a")


@pytest.mark.slow
def test_a_table_with_a_context_from_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_conditional(100)
    run_here(*FAST, "data=table", "data.path=t.csv", "data.context=b", "output_dir=run")
    main(["evaluate", BEST, "out=test.csv"])
    mean = -np.mean([float(row["log_prob"]) for row in read("test.csv")])
    assert mean == pytest.approx(json.loads(Path("run/results.json").read_text())["metrics"]["test/nll"], rel=1e-5)
    density = divflow.load("run/checkpoints/best.ckpt")
    assert (density.columns, density.context_columns) == (["a"], ["b"])
    main(["sample", BEST, "context={b: 7}", "num_samples=5", "out=s.csv"])
    main(["sample", BEST, "context=[7]", "num_samples=5", "out=t.npy"])
    np.testing.assert_allclose([float(row["a"]) for row in read("s.csv")], np.load("t.npy")[:, 0])
    # Of another file the context is found by its name.
    write([[21.0, 0.0, 10.0], [30.0, 0.0, 12.0]], "other.csv", "a,id,b")
    main(["evaluate", BEST, "data=table", "data.path=other.csv", "split=all", "out=other.npy"])
    expected = density.log_prob(torch.tensor([[21.0], [30.0]]), torch.tensor([[10.0], [12.0]])).detach()
    np.testing.assert_allclose(np.load("other.npy")[:, 0], expected, rtol=1e-5)
    write([[21.0, 0.0], [30.0, 0.0]], "none.csv", "a,id")
    assert "none.csv has no column b" in refused("evaluate", BEST, "data=table", "data.path=none.csv", "out=none.npy")
    main(["sample", BEST, "context=7", "num_samples=5", "out=u.npy"])
    assert (np.load("u.npy") == np.load("t.npy")).all()
    assert (density.sample(3, {"b": 7.0}).shape, density.sample(2, {"b": [7.0, 8.0]}).shape) == ((3, 1), (2, 1))
    given = divflow.data.Table("t.csv", context="b")
    assert density.context_range == [[end] for end in given._all.context[given.train.numbers].aminmax()]
    with pytest.warns(UnitsWarning, match=r"^b=700 lies outside the training data's \d\S+ to 1\d\S+\. The density"):
        main(["sample", BEST, "context=700", "num_samples=5", "out=far.npy"])
    write([[21.0, 0.0, 10.0], [30.0, 0.0, -120.0]], "far.csv", "a,id,b")
    with pytest.warns(UnitsWarning, match=r"^b=-120 lies outside") as said:
        main(["evaluate", BEST, "data=table", "data.path=far.csv", "batch_size=1", "out=far.csv.npy"])
    assert len([it for it in said if "lies outside" in str(it.message)]) == 1
    assert "Give 1 number (b), as context=0.1" in refused("sample", BEST, "out=none.npy")
    assert "names a, but the columns of the context are b" in refused("sample", BEST, "context={a: 1}", "out=none.npy")
    assert "context must be 1 number (b)" in refused("sample", BEST, "context='12'", "out=none.npy")
    given = refused("evaluate", BEST, "data=table", "data.path=t.csv", "data.context=a", "out=none.npy")
    assert "data.context=['a'] are not those of the training, ['b']" in given


@pytest.mark.slow
def test_a_context_is_learnt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_conditional(2_000)
    steps = ["trainer.max_steps=300", "trainer.val_check_interval=300"]
    fast = [it for it in FAST if not it.startswith(("trainer.max_steps", "trainer.val"))]
    run_here(
        *fast, *steps, "data=table", "data.path=t.csv", "data.context=b", "callbacks.average=null", "output_dir=run"
    )
    results = json.loads(Path("run/results.json").read_text())["metrics"]
    assert results["test/nll"] == pytest.approx(norm(0, 1).entropy(), abs=0.15)
    for context, centre in (("{b: 7}", 14.0), ("[13]", 26.0)):
        main(["sample", BEST, f"context={context}", "num_samples=500", "out=s.csv", "overwrite=true"])
        samples = np.array([float(row["a"]) for row in read("s.csv")])
        assert (abs(samples.mean() - centre) < 0.3, abs(samples.std() - 1) < 0.3) == (True, True)


@pytest.mark.slow
def test_whole_numbers_are_sampled_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    write(np.stack([generator.normal(0, 1, 200), generator.poisson(4, 200)], axis=1), names="a,visits")
    run_here(
        *FAST,
        "data=table",
        "data.path=t.csv",
        "data.discrete=[visits]",
        "data.bounds={visits: [0, null]}",
        "output_dir=run",
    )
    main(["sample", BEST, "num_samples=50", "out=s.csv"])
    visits = [row["visits"] for row in read("s.csv")]
    assert all(it.isdigit() for it in visits)
    main(["evaluate", BEST, "out=test.csv"])
    main(["evaluate", BEST, "data=table", "data.path=t.csv", "split=all", "out=all.csv"])  # which noise is known
    every = {row["row"]: float(row["log_prob"]) for row in read("all.csv")}
    for row in read("test.csv"):
        assert float(row["log_prob"]) == pytest.approx(every[row["row"]], rel=1e-5)


def test_rows_beyond_bounds_are_refused_in_every_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = np.random.default_rng(0).random((100, 2))
    write(inside)
    train(config(*FAST, "data=table", "data.path=t.csv", "data.bounds={a: [0, 1]}", "output_dir=run"))
    beyond = inside.copy()
    beyond[7, 0] = -0.5
    write(beyond, "beyond.csv")
    for data in (["+data.path=beyond.csv"], ["data=table", "data.path=beyond.csv"]):
        message = refused("evaluate", BEST, *data, "split=all")
        assert "1 of 100 rows are at or beyond the bounds of the density" in message
        assert "row 7 (-0.5," in message
    assert "at or beyond its bounds" in refused("evaluate", BEST, "+data.path=beyond.csv", "split=test")
    assert not Path("log_prob.csv").exists()


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 10, pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("shape", "data"), [("(1, 8, 8)", []), ("(64,)", ["data=digits"])], ids=["images", "vectors"])
def test_a_grid_of_images_alone_that_fits(tmp_path, monkeypatch, count, shape, data):
    """Of images without data; vectors are known to be images by these."""
    monkeypatch.chdir(tmp_path)
    Path("own_images.py").write_text(
        "import torch\nfrom divflow.flow import ContinuousFlow, FlowDensity\nfrom divflow.flow.transforms import Affine\n"
        f"def white():\n    return FlowDensity(ContinuousFlow(lambda t, x: 0 * x, {shape}), Affine(1.0, 1e-9))\n"
    )
    monkeypatch.delitem(sys.modules, "own_images", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["sample", "model._target_=own_images.white", *data, f"num_samples={count}", "out=grid.png"])
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    pixels = np.asarray(Image.open("grid.png").convert("L"))
    dots = max(pixels.shape) // (9 * columns)
    assert pixels.shape == (9 * rows * dots, 9 * columns * dots)
    places = pixels[4 * dots :: 9 * dots, 4 * dots :: 9 * dots].flatten()
    assert places.tolist() == [255] * count + [0] * (rows * columns - count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["network.hidden='64'"], r"network\.hidden must be a list, such as \[64,64\], but is the text '64'"),
        (["data=digits", "data.event_shape='64'"], r"data\.event_shape must be a list"),
        (["task=score", "sde=none", "noise_levels='51'"], r"noise_levels must be a list"),
        (["task=score", "sde=none", "sampler.sigmas='51'"], r"sampler\.sigmas must be a list"),
    ],
)
def test_text_in_place_of_a_list(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(config("output_dir=x", *settings))

"""`divflow evaluate` and `divflow sample` on a trained density: the numbers of its run, in its files' terms."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from processes import process_group
from run import DRAWN, FAST, ROOT, SMALL_TOY, config

import divflow
from divflow.cli import main
from divflow.flow.units import UnitsWarning
from divflow.runs.experiment import train

ROWS = torch.tensor([[150.5 + i * 7 % 13, 50.5 + i % 7 + i * 3 % 5] for i in range(60)], dtype=torch.float64)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    table = folder / "people.csv"
    table.write_text("height,weight\n" + "".join(f"{a:.1f},{b:.1f}\n" for a, b in ROWS.tolist()))
    train(config(*FAST, "data=table", f"data.path={table}", f"output_dir={folder}", "callbacks.average.decay=0.5"))
    return folder


@pytest.fixture
def best(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run_folder / "checkpoints" / "best.ckpt"


def read(path):
    with open(path, newline="") as file:
        names, *rows = csv.reader(file)
    return names, np.array(rows, dtype=float)


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value.code).startswith("error: ")
    return str(stopped.value.code)


def test_the_numbers_of_the_run_come_back(best, run_folder, capsys):
    main(["evaluate", f"ckpt_path={best}"])
    names, values = read("log_prob.csv")
    assert names == ["log_prob", "standard_error", "quadrature_error", "row"]
    results = json.loads((run_folder / "results.json").read_text())["metrics"]
    np.testing.assert_allclose(-values[:, 0].mean(), results["test/nll"], rtol=1e-6)
    assert (values[:, 1] == 0).all()
    table = " ".join(capsys.readouterr().out.split())
    assert f"{results['test/nll']:.4f} ± {results['test/nll_standard_error']:.4f}" in table
    assert "best.ckpt, averaged weights of step" in table


def test_all_rows_of_a_file_are_evaluated_in_its_order(best):
    main(["evaluate", f"ckpt_path={best}", "split=all", "out=all.npy"])
    expected = divflow.load(best).log_prob(ROWS.float()).detach().numpy()
    np.testing.assert_allclose(np.load("all.npy")[:, 0], expected, rtol=1e-5)


def test_one_row_has_no_standard_error(best, capsys):
    Path("one.csv").write_text("height,weight\n151,55\n")
    main(["evaluate", f"ckpt_path={best}", "+data.path=one.csv", "split=all"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "negative log-likelihood" in line]
    assert f"{-read('log_prob.csv')[1][0, 0]:.4f} │ nats" in line


def test_columns_are_those_of_the_training_by_their_names(best, tmp_path):
    density = divflow.load(best)
    assert density.columns == ["height", "weight"]
    (tmp_path / "swapped.csv").write_text("weight,id,height\n55,1,151\n52,2,160\n")
    expected = density.log_prob(torch.tensor([[151.0, 55.0], [160.0, 52.0]])).detach()
    for name, columns in {"a.csv": [], "b.csv": ["data.columns=[weight,height]"]}.items():
        table = ["data=table", "data.path=swapped.csv", "split=all", f"out={name}"]
        main(["evaluate", f"ckpt_path={best}", *table, *columns])
        np.testing.assert_allclose(read(name)[1][:, 0], expected, rtol=1e-5)
    (tmp_path / "other.csv").write_text("height,mass\n151,55\n160,52\n")
    table = ["evaluate", f"ckpt_path={best}", "data=table", "data.path=other.csv"]
    assert "other.csv has no column weight. Choose from height, mass" in refused(*table)
    assert "mass, weight in one of them only" in refused(*table, "data.columns=[height,mass]")
    main(["sample", f"ckpt_path={best}", "num_samples=3"])
    assert read("samples.csv")[0] == ["height", "weight"]


def test_the_evaluation_can_be_another(best):
    main(["evaluate", f"ckpt_path={best}", "estimator=hutchinson", "estimator.num_probes=2", "solver=dopri5"])
    _, values = read("log_prob.csv")
    assert (values[:, 1] > 0).all()
    main(["evaluate", f"ckpt_path={best}", "estimator=hutchinson", "estimator.num_probes=2", "solver=dopri5",
          "out=again.csv"])  # fmt: skip
    np.testing.assert_array_equal(values, read("again.csv")[1])


@pytest.mark.slow
def test_several_processes_give_the_numbers_of_one(best):
    """Of probes, too, which follow the batch and not the process."""
    noisy = [f"ckpt_path={best}", "estimator=hutchinson", "split=all", "batch_size=7"]
    main(["evaluate", *noisy, "out=one.npy"])
    command = [sys.executable, "-m", "divflow", "evaluate", *noisy, "out=two.npy", "device=multi_process_cpu"]
    with process_group(command, "two.log") as process:
        assert process.wait(timeout=300) == 0, Path("two.log").read_text()
    output = Path("two.log").read_text()
    np.testing.assert_allclose(np.load("two.npy"), np.load("one.npy"), rtol=1e-5)
    assert output.count("Log-densities, in nats: two.npy") == 1
    mean, error = map(float, re.search(r"likelihood\W+(-?[\d.]+) ± ([\d.]+)", output).groups())
    found = -np.load("one.npy")[:, 0]
    np.testing.assert_allclose([mean, error], [found.mean(), found.std(ddof=1) / len(found) ** 0.5], atol=1e-4)


def test_discrete_data_are_evaluated_as_such(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = train(config(*FAST, "data=digits", "network.hidden=[8]", "output_dir=run"))
    main(["evaluate", "ckpt_path=run/checkpoints/best.ckpt"])
    names, values = read("log_prob.csv")
    assert names[3:] == ["bits_per_dim", "row"]
    np.testing.assert_allclose(values[:, 3].mean(), results["test/bits_per_dim"], rtol=1e-6)
    main(["evaluate", "ckpt_path=run/checkpoints/best.ckpt", "+data.num_draws=4", "out=draws.csv"])
    names, values = read("draws.csv")
    assert names[3:] == ["bits_per_dim", "bits_per_dim_importance_weighted", "row"]
    assert (values[:, 4] < values[:, 3]).all()
    table = " ".join(capsys.readouterr().out.split())
    assert "discrete data, importance-weighted" in table
    assert "of that ±, by the dequantization" in table


def test_images_of_a_folder_are_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "others"):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = np.random.default_rng(i + len(name)).integers(0, 256, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    train(config(*FAST, "data=images", "data.path=photos", "network.hidden=[8]", "output_dir=run"))
    best = "ckpt_path=run/checkpoints/best.ckpt"
    for i, other in enumerate([["+data.path=others"], ["data=images", "data.path=others"]]):
        main(["evaluate", best, "split=all", f"out={i}.npy", *other])
    assert len(np.load("0.npy")) == 20
    np.testing.assert_allclose(np.load("0.npy"), np.load("1.npy"), rtol=1e-5)


@pytest.mark.parametrize("command", ["evaluate", "sample"])
@pytest.mark.parametrize(
    "data", sorted({path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")} - {"custom"})
)
def test_any_data_can_be_named(command, data):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        named = compose(command, [f"data={data}", "device=cpu"])
    assert named.data._target_.startswith("divflow.data.")
    assert named.get("network") is None
    assert named.get("evaluation") is None


def test_a_function_of_ones_own_makes_the_density(best, tmp_path):
    (tmp_path / "own_density.py").write_text(
        "from divflow.flow import ContinuousFlow\ndef shrink(rate):\n    return ContinuousFlow(lambda t, x: -rate * x, 2)\n"
    )
    np.save("points.npy", np.zeros((3, 2)))
    main(["evaluate", "model._target_=own_density.shrink", "+model.rate=1.0", "data=table", "data.path=points.npy",
          "split=all"])  # fmt: skip
    expected = 2.0 - np.log(2 * np.pi)  # of N(0, e^-2) at its mode
    np.testing.assert_allclose(read("log_prob.csv")[1][:, 0], expected, rtol=1e-4)
    assert "made a dict" in refused("sample", "model._target_=builtins.dict", "out=x.npy")
    assert "own_density" in refused("sample", "model._target_=own_density.nothing", "out=x.npy")


_FAILING = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, t, x):
        return self.net(x)

class Lacking(Wide):
    def forward(self, t, x):
        return self.nothing(x)

class Unmade(Wide):
    def __init__(self):
        raise KeyError("width")

class Swapped(Wide):
    def forward(self, x, t):
        return self.net(torch.cat([x, t.expand(len(x), 1)], dim=1))
"""


OWN = [it for it in FAST if not it.startswith("network")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Wide",
            r"^error: RuntimeError: mat1 and mat2 .* \(own_failing\.py, line 11: return self\.net\(x\)\)\. For the",
        ),
        ("Lacking", r"^error: AttributeError: .*'nothing' \(own_failing\.py, line 15: return self\.nothing\(x\)\)"),
        ("Unmade", r"^error: KeyError: 'width' \(own_failing\.py, line 19: "),
        ("Swapped", r"^error: the field is called as g\(t, x\), but Swapped takes \(x, t\)\. Swap them"),
    ],
)
def test_an_error_of_an_own_network_is_a_line_with_its_place(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_failing.py").write_text(_FAILING)
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "train",
                *OWN,
                "network=custom",
                f"network._target_=own_failing.{name}",
                *SMALL_TOY,
                "output_dir=run",
            ]
        )
    assert re.search(message, str(stopped.value.code)), stopped.value.code


def test_an_error_of_divflow_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("divflow.runs.experiment.print_results", None)
    with pytest.raises(SystemExit):
        main(["train", *FAST, *SMALL_TOY, "output_dir=run"])
    assert re.search(r'experiment\.py", line \d+, in _train\n.*\nTypeError: ', capsys.readouterr().err)


_GIVEN = """
import torch
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine

def given(count, columns=None):
    flow = ContinuousFlow(lambda t, x, c: (c.sum(dim=1, keepdim=True) - x).expand_as(x), 1)
    density = FlowDensity(flow, Affine(), Affine(torch.full((count,), 40.0), torch.ones(count)))
    density.context_columns = columns
    return density
"""


def test_a_context_is_a_number_where_the_density_is_given_one(best, tmp_path):
    (tmp_path / "own_given.py").write_text(_GIVEN)
    sample = ["sample", "model._target_=own_given.given", "num_samples=3"]
    for name, context in (("number", "41"), ("list", "[41]"), ("other", "42.0")):
        main([*sample, "+model.count=1", f"context={context}", f"out={name}.npy"])
    assert (np.load("number.npy") == np.load("list.npy")).all()
    assert (np.load("number.npy") != np.load("other.npy")).all()
    main([*sample, "+model.count=1", "+model.columns=[age]", "context={age: 41}", "out=named.npy"])
    assert (np.load("named.npy") == np.load("list.npy")).all()
    for settings, message in (
        (["+model.count=2", "context=41"], "a list of 2 numbers, as context=[0.1,...], but is 41"),
        (["+model.count=2", "+model.columns=[age,size]", "context=41"], "a list of 2 numbers (age, size), as"),
        (["+model.count=1", "context=old"], "1 number, as context=0.1, but is 'old'"),
        (["+model.count=1", "context={age: 41}"], "the columns of the context are unnamed. Give a list"),
        (
            ["+model.count=1", "+model.columns=[age]", "context={age: old}"],
            "age of the context must be a number, as \"context={age: 0.1}\", but is 'old'",
        ),
        (
            ["+model.count=1", "+model.columns=[age]", "context=old"],
            "1 number (age), as context=0.1 or \"context={age: 0.1}\", but is 'old'",
        ),
        (
            ["+model.count=1", "+model.columns=[age]", "context={old: 41}"],
            "names old, but the columns of the context are age",
        ),
    ):
        assert message in refused(*sample, *settings, "out=none.npy")


_PIXELS = """
from divflow.adapters import from_flow_matching
from divflow.flow import FlowDensity
from divflow.flow.transforms import Affine

def bare(**options):
    return from_flow_matching(lambda x, t: -x, (1, 8, 8), **options)

def informed():
    return bare(data_range=(-1, 1))

def scaled():
    return FlowDensity(bare(), Affine.between((0, 1), (-1, 1)))
"""


@pytest.mark.filterwarnings("ignore::divflow.flow.units.UnitsWarning")
def test_images_are_brought_to_the_range_of_a_model_trained_elsewhere(best, tmp_path):
    """N(0, e^-2) of pixels from -1 to 1 is that of pixels from 0 to 1 with 64 log 2 more."""
    (tmp_path / "own_pixels.py").write_text(_PIXELS)
    digits = ["data=digits", "data.event_shape=[1,8,8]"]

    def evaluated(name, *settings, data=digits):
        main(["evaluate", f"model._target_=own_pixels.{name}", *data, "out=a.csv", "overwrite=true", *settings])
        return read("a.csv")

    names, expected = evaluated("scaled")
    assert "bits_per_dim" in names
    for values in (
        evaluated("informed"),
        evaluated("bare", "data_range=[-1,1]"),
        evaluated("informed", "data_range=[-1,1]"),
    ):
        np.testing.assert_allclose(values[1], expected, rtol=1e-6)
    x = torch.cat([part.rows for part in [divflow.data.Digits((1, 8, 8)).test]])
    truth = torch.distributions.Normal(0.0, np.exp(-1.0)).log_prob(2 * x - 1).sum(dim=(1, 2, 3)) + 64 * np.log(2)
    np.testing.assert_allclose(expected[:, 0], truth, rtol=1e-4)
    bits = np.log2(17) - truth.numpy() / 64 / np.log(2)
    np.testing.assert_allclose(expected[:, names.index("bits_per_dim")], bits, rtol=1e-4)
    assert (evaluated("bare")[1][:, 0] > expected[:, 0]).all()  # of other pixels, which are less far from its mode
    run = ["evaluate", "overwrite=true"]
    assert "its own transform" in refused(*run, "model._target_=own_pixels.scaled", *digits, "data_range=[-1,1]")
    assert "data_range must be a range" in refused(*run, "model._target_=own_pixels.bare", *digits, "data_range=[1,-1]")
    assert "not discrete" in refused(*run, "model._target_=own_pixels.bare", "data=two_moons", "data_range=[-1,1]")
    main(["sample", "model._target_=own_pixels.informed", "num_samples=4", "out=a.png", *digits])
    main(["sample", "model._target_=own_pixels.informed", "num_samples=4", "out=a.npy"])
    assert np.load("a.npy").dtype == np.float64


def test_rows_in_other_units_are_warned_of(best, run_folder):
    main(["evaluate", f"ckpt_path={best}"])
    np.save("grams.npy", ROWS.numpy() * [1, 1000])
    with pytest.warns(UnitsWarning, match="most of the 60 rows are farther from the base"):
        main(["evaluate", f"ckpt_path={best}", "split=all", "+data.path=grams.npy", "out=grams.csv"])


def test_samples_have_the_digits_of_the_table(tmp_path, monkeypatch):
    """Of a column of dates, which differ in the ninth digit."""
    monkeypatch.chdir(tmp_path)
    dates = 2.46e6 + 0.1 * np.random.default_rng(0).standard_normal(100)
    Path("dates.csv").write_text("date\n" + "".join(f"{date!r}\n" for date in dates.tolist()))
    train(config(*DRAWN, "data=table", "data.path=dates.csv", "output_dir=run"))
    for out in ("a.csv", "a.npy"):
        main(["sample", "ckpt_path=run/checkpoints/best.ckpt", "num_samples=500", f"out={out}"])
        samples = read(out)[1] if out == "a.csv" else np.load(out)
        assert len(np.unique(samples)) == 500
        assert abs(samples.mean() - 2.46e6) < 0.1
    assert len(np.unique(np.load("run/samples.npy"))) > 200
    assert divflow.load("run/checkpoints/best.ckpt").sample(3).dtype == torch.float64


def test_what_is_not_finite_is_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_wide.py").write_text(
        "from divflow.flow import ContinuousFlow\nfrom divflow.flow import FlowDensity\nfrom divflow.flow.transforms import Affine\n"
        "def wide(scale):\n    return FlowDensity(ContinuousFlow(lambda t, x: -x, 1), Affine([0.0], [float(scale)]))\n"
    )
    main(["sample", "model._target_=own_wide.wide", "+model.scale=1e39", "out=a.csv", "num_samples=200"])
    assert np.isfinite(read("a.csv")[1]).all()
    assert "the samples must be finite" in refused(
        "sample", "model._target_=own_wide.wide", "+model.scale=1.5e308", "out=b.csv", "num_samples=2000"
    )
    assert not Path("b.csv").exists()


def test_samples_are_those_of_the_density_whatever_the_batches(best):
    main(["sample", f"ckpt_path={best}", "num_samples=50", "seed=3", "out=a.npy"])
    expected = divflow.load(best).sample(50, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(np.load("a.npy"), expected, rtol=1e-6)
    main(["sample", f"ckpt_path={best}", "num_samples=50", "seed=3", "batch_size=7", "out=b.csv"])
    np.testing.assert_allclose(np.load("a.npy"), read("b.csv")[1], rtol=1e-5)
    main(["sample", f"ckpt_path={best}", "num_samples=50", "seed=4", "out=c.npy"])
    assert (np.load("c.npy") != np.load("a.npy")).all()


def test_a_figure_of_samples(best):
    main(["sample", f"ckpt_path={best}", "num_samples=50", "out=a.png"])
    with open("a.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_scores_sample_by_their_sampler_and_have_a_density_over_an_sde_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*FAST, *SMALL_TOY, "task=score"]
    train(config(*small, "sampler=reverse_sde", "sampler.num_steps=5", f"output_dir={tmp_path}/sde"))
    best = "ckpt_path=sde/checkpoints/best.ckpt"
    for name in ("a", "b"):
        main(["sample", best, "num_samples=20", "batch_size=7", f"out={name}.npy"])
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    assert len(np.unique(np.load("a.npy"), axis=0)) == 20  # no batch repeats another's noise
    main(["evaluate", best])
    train(config(*small, "sde=none", "sampler.steps_per_level=2", f"output_dir={tmp_path}/none"))
    assert "no log-density" in refused("evaluate", "ckpt_path=none/checkpoints/best.ckpt", "overwrite=true")
    main(["sample", "ckpt_path=none/checkpoints/best.ckpt", "num_samples=5"])


MISTAKES = {
    "no density": (["evaluate"], "Give either ckpt_path=.*or.*model"),
    "no file": (["evaluate", "ckpt_path=none.ckpt"], "there is no file none.ckpt"),
    "no checkpoint": (["evaluate", "ckpt_path=there.csv"], r"there\.csv is not a checkpoint of plain tensors"),
    "no data": (["evaluate", "{best}", "+data.path=none"], "there is no file or folder none"),
    "context": (["sample", "{best}", "context=[1,2]"], "0 context features, but got 2"),
    "split": (
        ["evaluate", "{best}", "split=tset"],
        "split must be null or one of train, val, test, all, but is 'tset'",
    ),
    "suffix": (["evaluate", "{best}", "out=a.txt"], r"must end in \.csv or \.npy, but .*'\.txt'"),
    "figure suffix": (["sample", "{best}", "out=a"], r"\.csv or \.npy or \.png, but .*\(none\)"),
    "there already": (["evaluate", "{best}", "out=there.csv"], "there.csv exists.*overwrite=true"),
    "other data": (["evaluate", "{best}", "data=digits"], r"shape \(64,\).* trained on \(2,\)"),
    "batch size": (["evaluate", "{best}", "batch_size=0"], "batch_size must be a whole number of at least 1, but is 0"),
    "samples": (["sample", "{best}", "num_samples=0"], "num_samples must be a whole number of at least 1, but is 0"),
    "seed": (["sample", "{best}", "seed=zero"], "seed must be a whole number of at least 0, but is 'zero'"),
    "allowed": (
        ["sample", "{best}", "allow=[nowhere.Velocity]"],
        "allow=nowhere.Velocity can't be found: there is no module",
    ),
    "processes": (["sample", "{best}", "device=multi_process_cpu"], "runs in one process"),
    "precision": (["sample", "{best}", "device.precision=bf16-mixed"], "bf16-mixed is for training"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_reported(best, kind, tmp_path):
    (tmp_path / "there.csv").write_text("precious")
    arguments, message = MISTAKES[kind]
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(best=f"ckpt_path={best}") for argument in arguments])
    assert re.search(message, str(stopped.value.code))
    assert (tmp_path / "there.csv").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"there.csv"}


class Attack:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_checkpoints_of_another_architecture_or_with_code_are_refused(best, run_folder, tmp_path):
    changed = torch.load(best, weights_only=True)
    changed["divflow"]["network"]["hidden"] = [8]
    torch.save(changed, "other.ckpt")
    assert "of another architecture" in refused("evaluate", "ckpt_path=other.ckpt")
    torch.save({"divflow": Attack()}, "evil.ckpt")
    assert "plain tensors" in refused("sample", "ckpt_path=evil.ckpt")
    shutil.copytree(run_folder, tmp_path / "moved")
    saved = tmp_path / "moved" / "config.yaml"
    saved.write_text(saved.read_text().replace("divflow.data.Table", "os.system"))
    assert "names 'os.system'" in refused("evaluate", "ckpt_path=moved/checkpoints/best.ckpt")
    changed["divflow"]["network"] |= {"_target_": "own.Net", "activation": {"_target_": "own.Act"}}
    torch.save(changed, "moved/checkpoints/own.ckpt")
    assert "allow=[own.Net,own.Act,os.system]" in refused("evaluate", "ckpt_path=moved/checkpoints/own.ckpt")
    saved.write_text(saved.read_text().replace("os.system", "divflow.data.table.np.load"))
    assert "not divflow's own" in refused("evaluate", "ckpt_path=moved/checkpoints/best.ckpt")
    plain = saved.read_text()
    for name in ("data.table", "energies.nothing", "divergence.Exact"):
        saved.write_text(plain.replace("divflow.data.table.np.load", f"divflow.{name}"))
        assert "not divflow's own" in refused("evaluate", "ckpt_path=moved/checkpoints/best.ckpt")


def test_a_checkpoint_away_from_its_run_needs_the_data_named(best):
    shutil.copy(best, "alone.ckpt")
    assert "Give data=" in refused("evaluate", "ckpt_path=alone.ckpt")

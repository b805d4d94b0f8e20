"""Signals at any moment of a command, from its first import to its last file: its code, a word, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import process_group
from run import FAST, ROOT, SMALL_TOY, command, run

pytestmark = pytest.mark.faults
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def ended(arguments, log, sent, when):
    with process_group(arguments, log) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and not when():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        process.wait(timeout=120)
        # Before Python has begun the system itself ends it, which a shell reports by the same number.
        code = process.returncode
        return (code if code >= 0 else 128 - code), log.read_text()


@pytest.mark.parametrize("sent", CODES)
@pytest.mark.parametrize("stage", ["validation", "test"])
def test_after_the_last_step(tmp_path, stage, sent):
    """Seconds of validation, or of the test; what is resumed evaluates what was trained."""
    few = [setting for setting in SMALL_TOY if not setting.startswith(("data.num_val", "data.num_test"))]
    rows = [f"data.num_{name}={5000 if stage.startswith(name) else 20}" for name in ("val", "test")]
    kept = tmp_path / "run" / "checkpoints" / "last.ckpt"
    begun = tmp_path / "run" / "metrics.csv" if stage == "validation" else kept.with_name("best.ckpt")
    settings = [*FAST, *few, *rows, "data.eval_batch_size=10", "trainer.val_check_interval=4"]
    since = []

    def within():
        since.extend([time.monotonic()] if begun.is_file() and not since else [])
        return bool(since) and time.monotonic() - since[0] > 1.5

    code, said = ended(command(*settings, f"hydra.run.dir={tmp_path}/run"), tmp_path / "log", sent, within)
    assert code == CODES[sent], said
    assert "Traceback" not in said
    assert f"go on with ckpt_path={kept}" in said
    assert ("stopped in the test, after 4 steps" if stage == "test" else "stopped after 4 steps") in said
    assert not (tmp_path / "run" / "results.json").exists()
    done = run(*FAST, *SMALL_TOY, f"ckpt_path={kept}", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


@pytest.mark.parametrize("sent", CODES)
@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0, 3.5])
def test_before_the_first_step(tmp_path, seconds, sent):
    """Whatever is being imported or built."""
    started = time.monotonic()
    late = lambda: time.monotonic() - started > seconds  # noqa: E731
    code, said = ended(
        command(*FAST, "data.num_train=2000000", f"hydra.run.dir={tmp_path}/run"), tmp_path / "log", sent, late
    )
    assert code == CODES[sent], said
    assert "Traceback" not in said


@pytest.mark.parametrize("sent", CODES)
@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_in_the_other_commands(tmp_path, name, sent):
    subprocess.run(command(*FAST, *SMALL_TOY, f"hydra.run.dir={tmp_path}/run"), check=True, capture_output=True)
    long = {"evaluate": ["+data.num_test=2000000", "batch_size=10"], "sample": ["num_samples=2000000", "batch_size=10"]}
    out = tmp_path / "out.csv"
    arguments = [
        sys.executable,
        "-m",
        "divflow",
        name,
        f"ckpt_path={tmp_path}/run/checkpoints/best.ckpt",
        f"out={out}",
    ]
    started = time.monotonic()
    late = lambda: time.monotonic() - started > 8  # noqa: E731
    os.environ["PYTHONPATH"] = str(ROOT)
    code, said = ended([*arguments, *long[name]], tmp_path / "log", sent, late)
    assert code == CODES[sent], said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out.csv*"))

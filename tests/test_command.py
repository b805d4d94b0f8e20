"""The command as a user types it: several processes, interruptions, mistakes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hydra.errors import ConfigCompositionException, InstantiationException
from omegaconf.errors import OmegaConfBaseException
from run import FAST, SMALL_TOY, command, config, run, run_here
from torch import nn

from divflow.errors import DivflowError
from divflow.runs.experiment import train

SMALL = [*FAST, *SMALL_TOY]


def fields(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_two_processes_take_the_step_of_one_on_the_same_global_batch(tmp_path):
    """One SGD step over all 32 rows: its size is the gradient. 21 validation rows divide unevenly."""
    one_step = [
        *SMALL,
        "solver=rk4",
        "data.num_train=32",
        "data.num_val=21",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "task.optimizer._target_=torch.optim.SGD",
        "task.scheduler=null",
        "trainer.gradient_clip_val=null",
        "callbacks.average=null",
        "network.zero_init=false",
    ]
    train(config(*one_step, "data.batch_size=32", f"output_dir={tmp_path}/one"))
    done = run(*one_step, "device=multi_process_cpu", "data.batch_size=16", f"hydra.run.dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    states = [fields(tmp_path / name)["state_dict"] for name in ("one", "two")]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-5, atol=1e-7)
    nll = []
    for name in ("one", "two"):
        header, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("val/nll")
        nll.append([float(row.split(",")[column]) for row in rows if row.split(",")[column]])
    assert len(nll[0]) == 1
    np.testing.assert_allclose(nll[0], nll[1], rtol=1e-6)
    log = done.stdout
    assert log.count("negative log-likelihood") == 1  # the table is printed once


# `test_processes.py` sends either to one of two processes.
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.faults)]
)
def test_an_interrupted_run_can_be_gone_on_with(tmp_path, sent, code):
    endless = [*SMALL, "trainer.max_steps=100000", "trainer.val_check_interval=1000", f"hydra.run.dir={tmp_path}/a"]
    process = subprocess.Popen(command(*endless), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "a" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert f"ckpt_path={last}" in errors
    steps = fields(tmp_path / "a")["global_step"]
    assert steps > 0
    some = [f"trainer.max_steps={steps + 4}", "task.scheduler.T_max=100000"]
    train(config(*SMALL, f"ckpt_path={last}", *some, f"output_dir={tmp_path}/b"))
    assert fields(tmp_path / "b")["global_step"] == steps + 4


@pytest.fixture
def eager(tmp_path):
    return train(config(*SMALL, f"output_dir={tmp_path}/eager"))["test/nll"]


# Of torch's compiler all but the code that it makes of the graphs, which takes half a minute.
WITHOUT_CODE = """
import sys
from torch import nn
from divflow.cli import main

compiled = nn.Module.compile
nn.Module.compile = lambda module: print("compiled") or compiled(module, backend="aot_eager")
main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [False, True], ids=["graphs", "code"])
def test_compiled_network_trains_to_the_same_result(tmp_path, eager, code):
    settings = [*SMALL, "compile=true", f"hydra.run.dir={tmp_path}/compiled"]
    started = command(*settings) if code else [sys.executable, "-c", WITHOUT_CODE, *settings]
    done = subprocess.run(started, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert code or done.stdout.count("compiled\n") == 1
    header, *rows = (tmp_path / "compiled" / "metrics.csv").read_text().splitlines()
    np.testing.assert_allclose(float(rows[-1].split(",")[header.split(",").index("test/nll")]), eager, rtol=1e-3)


def test_what_compiling_costs_is_reported_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nn.Module, "compile", lambda module: None)
    train(config(*SMALL, "compile=true", f"output_dir={tmp_path}"))
    assert "compile=true: torch compiles the network once for each way" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_compiler_nothing_is_compiled(tmp_path):
    env = os.environ | {"CXX": "nowhere++"}
    settings = command(*SMALL, "compile=true", f"hydra.run.dir={tmp_path}")
    done = subprocess.run(settings, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 1
    assert "compile=true needs a C++ compiler, but nowhere++ is not there" in done.stderr
    assert "Traceback" not in done.stderr


MISTAKES = {
    "missing file": (["data=table", "data.path=nowhere.csv"], "nowhere.csv (looked in"),
    "no path": (["data=table"], "data.path"),
    "unknown method": (["solver.method=dopri9"], "unknown solver method 'dopri9'"),
    "unknown option": (["+solver.options.stepsize=1"], "dopri5 has no option stepsize"),
    "typo": (["trainer.step=1"], "trainer.step"),
    "no GPU": (["device=gpu"], "device=cpu"),
    "batch norm": (
        ["network.activation._target_=torch.nn.BatchNorm1d", "+network.activation.num_features=16"],
        "BatchNorm1d that normalizes over the batch",
    ),
    "blow-up": (["network.zero_init=false", "t_data=1e6", "solver.max_evaluations=100"], "more than 100 evaluations"),
    "seed": (["seed=-1"], "seed must be null or a whole number in [0, 2^32), but is -1"),
    "seed that is no number": (["seed=a"], "but is 'a'"),
    "batch size": (["data.eval_batch_size=0"], "data.eval_batch_size must be a whole number of at least 1, but is 0"),
    "data seed": (["data.seed=-1"], "data.seed must be a whole number of at least 0, but is -1"),
    "missing checkpoint": (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt (looked in"),
}


@pytest.mark.parametrize("kind", [kind for kind in MISTAKES if kind != "no GPU" or not torch.cuda.is_available()])
def test_mistakes_name_the_value_and_the_remedy(tmp_path, kind):
    overrides, message = MISTAKES[kind]
    toy = [] if "data=table" in overrides else SMALL_TOY
    errors = (DivflowError, InstantiationException, ConfigCompositionException, OmegaConfBaseException)
    with pytest.raises(errors) as caught:
        train(config(*FAST, *toy, *overrides, f"output_dir={tmp_path}"))
    assert message in f"{caught.value} {caught.value.__cause__}"


TYPED = ["missing file", "no path", "unknown method", "batch norm"]


@pytest.mark.parametrize("kind", TYPED)
def test_mistakes_end_with_a_message_alone(tmp_path, kind):
    """What `sys.exit` prints, and no more."""
    overrides, message = MISTAKES[kind]
    with pytest.raises(SystemExit) as stopped:
        run_here(*FAST, *overrides, f"hydra.run.dir={tmp_path}")
    assert message in stopped.value.code
    assert "Traceback" not in stopped.value.code


@pytest.mark.parametrize(
    "kind", ["unknown method", *(pytest.param(k, marks=pytest.mark.slow) for k in TYPED if k != "unknown method")]
)
def test_mistakes_end_without_a_traceback(tmp_path, kind):
    overrides, message = MISTAKES[kind]
    done = run(*FAST, *overrides, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr

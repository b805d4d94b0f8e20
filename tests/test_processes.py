"""Several processes: one dies, they are stopped, they are of another number, they are on two nodes."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from processes import free_port, members, process_group, wait_for
from run import FAST, ROOT, SMALL_TOY, command, config

from divflow.runs.experiment import train
from divflow.saved.build import ConfigError

SMALL = [*FAST, *SMALL_TOY]
TWO = [*SMALL, "device=multi_process_cpu"]
ENDLESS = [*TWO, "trainer.max_steps=100000", "trainer.val_check_interval=20"]


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def child(process):
    """The launched rank 1 of a run whose rank 0 is `process`."""
    ranks = {}
    for number in members(process.pid):
        environment = Path(f"/proc/{number}/environ").read_bytes()
        ranks[b"LOCAL_RANK=1" in environment] = number
    return ranks[True]


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["training", "validation"])
def test_a_killed_process_ends_the_others_with_a_message(tmp_path, rank, stage):
    settings = list(ENDLESS)
    if stage == "validation":  # which takes many times the second that it is given below
        settings += ["data.num_val=20000", "data.eval_batch_size=10", "trainer.val_check_interval=1"]
    log, last = tmp_path / "log", tmp_path / "run" / "checkpoints" / "last.ckpt"
    with process_group(command(*settings, f"hydra.run.dir={tmp_path}/run"), log) as process:
        wait_for(last.is_file)
        time.sleep(1)
        dead = process.pid if rank == 0 else child(process)
        os.kill(dead, signal.SIGKILL)
        started = time.monotonic()
        wait_for(lambda: process.poll() is not None and not members(process.pid), 60)
        print(f"rank {rank} killed in {stage}: the others ended after {time.monotonic() - started:.1f} s")
    message = log.read_text()
    assert re.search(rf"error: rank {rank} of 2 \(process {dead} on \S+\) died at step \d+", message), message
    assert f"Go on with ckpt_path={last}" in message


LEAVES_LATE = """
import os, time
from lightning.pytorch.callbacks import Checkpoint

class LeavesLate(Checkpoint):  # so that it comes after the one that saves
    def on_exception(self, trainer, pl_module, exception):
        if os.environ.get("LOCAL_RANK") == "1":
            time.sleep(4)
"""


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_process_stops_all_after_the_same_step(tmp_path, number):
    (tmp_path / "late.py").write_text(LEAVES_LATE)  # the others' way out may take longer than rank 0's
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    log, last = tmp_path / "log", tmp_path / "run" / "checkpoints" / "last.ckpt"
    settings = [*ENDLESS, "+callbacks.late._target_=late.LeavesLate", f"hydra.run.dir={tmp_path}/run"]
    with process_group(command(*settings), log, env) as process:
        wait_for(last.is_file)
        os.kill(child(process), number)
        wait_for(lambda: process.poll() is not None, 60)
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], log.read_text()
        wait_for(lambda: not members(process.pid), 30)
    assert f"go on with ckpt_path={last}" in log.read_text()
    assert checkpoint(tmp_path / "run")["callbacks"]["Processes"] == {"world_size": 2}


FAILS = """
from torch import nn
import torch, os

class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), 0

    def forward(self, t, x):
        self.calls += 1
        if self.calls > 1500 and os.environ.get("LOCAL_RANK") == "1":
            raise ArithmeticError("of my own")
        return self.net(x) * t.reshape(-1, 1)
"""


@pytest.mark.faults
def test_a_process_that_raises_ends_the_others_with_its_message(tmp_path):
    (tmp_path / "failing.py").write_text(FAILS)
    own = ["network=custom", "network._target_=failing.Velocity"]
    settings = [override for override in ENDLESS if not override.startswith("network")]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    log = tmp_path / "log"
    with process_group(command(*settings, *own, f"hydra.run.dir={tmp_path}/run"), log, env) as process:
        wait_for(lambda: process.poll() is not None and not members(process.pid))
    assert re.search(r"error: rank 1 of 2 .* ended by ArithmeticError: of my own at step \d+", log.read_text())


STIFF = """
from torch import nn
import torch, os

class Velocity(nn.Module):
    \"\"\"Rank 1's field turns thirty times faster, so that its solver evaluates it far more often.\"\"\"

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.speed = 30.0 if os.environ.get("LOCAL_RANK") == "1" else 1.0
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        turned = torch.stack([-x[:, 1], x[:, 0]], 1) * self.speed
        with open(os.environ["CALLS"] + os.environ.get("LOCAL_RANK", "0"), "w") as file:
            file.write(str(self.calls))
        return turned + 0.1 * torch.tanh(self.net(x))
"""


@pytest.mark.faults
def test_processes_that_need_different_numbers_of_evaluations_do_not_wait_inside_a_solve(tmp_path):
    (tmp_path / "stiff.py").write_text(STIFF)
    settings = [override for override in TWO if not override.startswith(("network", "solver@", "likelihood@", "eval"))]
    own = ["network=custom", "network._target_=stiff.Velocity", "likelihood=quadrature_tight", "data.num_val=21"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CALLS": f"{tmp_path}/calls"}
    log = tmp_path / "log"
    with process_group(command(*settings, *own, f"hydra.run.dir={tmp_path}/run"), log, env) as process:
        wait_for(lambda: process.poll() is not None)
        assert process.returncode == 0, log.read_text()
    few, many = (int((tmp_path / f"calls{rank}").read_text()) for rank in (0, 1))
    assert many > 5 * few


def test_a_solve_begins_no_collective_and_a_step_is_one_forward_pass_of_ddp(tmp_path, monkeypatch):
    """With collectives that fail inside `evaluate`, one process of a group of one trains all the same."""
    from torch.nn.parallel import DistributedDataParallel

    from divflow.flow import FlowDensity

    depth, forwards, counted = [], [], []
    evaluate, forward = FlowDensity.evaluate, DistributedDataParallel.forward

    def watched(*args, **kwargs):
        depth.append(1)
        try:
            return evaluate(*args, **kwargs)
        finally:
            depth.pop()

    def collective(name):
        original = getattr(torch.distributed, name)

        def call(*args, **kwargs):
            assert not depth, f"{name} inside a solve"
            counted.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.distributed, name, call)

    for name in ("all_reduce", "broadcast", "all_gather", "barrier", "reduce", "gather", "all_gather_object"):
        collective(name)
    monkeypatch.setattr(FlowDensity, "evaluate", watched)

    def counted_forward(self, *args, **kwargs):
        forwards.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DistributedDataParallel, "forward", counted_forward)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        train(config(*TWO, "device.devices=1", f"output_dir={tmp_path}"))
    finally:
        torch.distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    assert sum(forwards) == 4  # steps; the rest is validation
    assert counted


def test_another_number_of_processes_says_what_changes(tmp_path):
    train(config(*SMALL, "trainer.max_steps=2", "task.scheduler.T_max=4", f"output_dir={tmp_path}"))
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert saved["callbacks"]["Processes"] == {"world_size": 1}
    saved["callbacks"]["Processes"]["world_size"] = 2
    torch.save(saved, last)
    with pytest.warns(
        UserWarning, match=r"2 processes, but 1 resumes.*from 32 to 16 rows \(data.batch_size=32 keeps it\)"
    ):
        train(config(*SMALL, f"ckpt_path={last}", f"output_dir={tmp_path}"))


@pytest.mark.faults
def test_two_nodes_as_the_guide_starts_them_are_two_processes_of_one(tmp_path):
    page = (ROOT / "docs" / "processes.md").read_text()
    pattern = r"torchrun --nnodes=2 --nproc-per-node=1 --node-rank=\$NODE.* device=multi_process_cpu device.devices=1 "
    line = re.search(rf"{pattern}device.num_nodes=2", page).group()
    line = line.replace("$FIRST_NODE", "127.0.0.1").replace("$PORT", str(free_port()))
    settings = [override for override in SMALL if not override.startswith("device")]
    logs = [tmp_path / f"log{node}" for node in (0, 1)]

    def node(rank):
        words = line.replace("$NODE", str(rank)).replace("train.py", str(ROOT / "train.py")).split()
        own = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        return process_group([*own, *settings, f"hydra.run.dir={tmp_path}/nodes"], logs[rank])

    with node(0) as first, node(1) as second:
        wait_for(lambda: first.poll() is not None and second.poll() is not None)
        assert first.returncode == second.returncode == 0, logs[0].read_text() + logs[1].read_text()
    with process_group(command(*TWO, f"hydra.run.dir={tmp_path}/one"), tmp_path / "log") as process:
        wait_for(lambda: process.poll() is not None)
        assert process.returncode == 0
    nodes, one = (checkpoint(tmp_path / name)["state_dict"] for name in ("nodes", "one"))
    assert all(torch.equal(value, one[key]) for key, value in nodes.items())


@mock.patch.dict(os.environ)  # restored as it was, whatever the environment's class sets
def test_the_slurm_script_sets_what_lightning_takes(monkeypatch):
    """Each of its 8 tasks, with what SLURM would set for the script's own `#SBATCH` lines."""
    page = (ROOT / "docs" / "processes.md").read_text()
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL).group(1)
    options = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", script))
    nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
    run = script.replace("\\\n", " ")
    device = config(*re.findall(r" (device\S*=\S+)", run)).device
    assert options["gpus-per-node"] == str(tasks)
    assert options["signal"].startswith("TERM@")  # to the tasks, and not to the script's shell ("B:")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(name)
    common = {"NTASKS": nodes * tasks, "NTASKS_PER_NODE": tasks, "NNODES": nodes, "JOB_ID": 4711, "JOB_NAME": "divflow"}
    monkeypatch.setenv("SLURM_NODELIST", "node[07-08]")
    for name, value in common.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    ranks = []
    for process in range(nodes * tasks):
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # which the one before has set
        for name, value in {"PROCID": process, "LOCALID": process % tasks, "NODEID": process // tasks}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        assert SLURMEnvironment.detect()
        environment = SLURMEnvironment()
        environment.validate_settings(num_devices=device.devices, num_nodes=device.num_nodes)
        assert environment.creates_processes_externally
        assert environment.main_address == "node07"
        assert environment.main_port == 15000 + 4711
        assert environment.world_size() == device.devices * device.num_nodes == 8
        ranks.append((environment.global_rank(), environment.node_rank() * tasks + environment.local_rank()))
    assert ranks == [(process, process) for process in range(8)]


@pytest.mark.parametrize(
    ("there", "overrides", "message"),
    [
        (0, [], r"devices=auto asks for GPUs.*torch sees none.*Use device=cpu or device=multi_process_cpu"),
        (0, ["device.devices=4"], "devices=4 asks for GPUs.*torch sees none"),
        (2, ["device.devices=4"], "devices=4 asks for GPUs.*torch sees 2.*Use device.devices=2"),
        (2, ["device.devices=[0,5]"], r"devices=\[0, 5\] asks for GPUs.*torch sees 2"),
    ],
)
def test_missing_gpus_are_named(tmp_path, monkeypatch, there, overrides, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ConfigError, match=message):
        train(config(*SMALL, "device=multi_gpu", *overrides, f"output_dir={tmp_path}"))

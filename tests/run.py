"""Runs of the real configs, in this process or as the command."""

import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).parents[1]
FAST = [
    "device=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "callbacks.figures.every_n_steps=0",
    "network.hidden=[16]",
    "solver@evaluation.solver=rk4",
    "likelihood@evaluation.likelihood=quadrature_7",
]
SMALL_TOY = ["data.num_train=64", "data.num_val=20", "data.num_test=30", "data.batch_size=16"]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", list(overrides))


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def run(*overrides: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command(*overrides), capture_output=True, text=True, timeout=timeout, check=False)

"""Runs of the real configs, in this process or as the command."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from divflow.cli import main

ROOT = Path(__file__).parents[1]
FAST = [
    "device=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "callbacks.figures=null",
    "network.hidden=[16]",
    "solver@evaluation.solver=rk4",
    "evaluation.solver.options.step_size=0.2",
    "likelihood@evaluation.likelihood=quadrature_7",
]
# With the figures of the end, which take more than twice as long as all the rest.
DRAWN = [*(it for it in FAST if it != "callbacks.figures=null"), "callbacks.figures.every_n_steps=0"]
SMALL_TOY = ["data.num_train=64", "data.num_val=20", "data.num_test=30", "data.batch_size=16"]


def config(*overrides: str) -> DictConfig:
    """The config of a run; settings that differ in `output_dir` alone are composed once, but where other folders are searched."""
    folders = [override for override in overrides if override.startswith("output_dir=")]
    searched = any(override.startswith("hydra.searchpath") for override in overrides)
    compose_them = _composed.__wrapped__ if searched else _composed
    composed = copy.deepcopy(compose_them(*(override for override in overrides if override not in folders)))
    for folder in folders:
        composed.output_dir = folder.removeprefix("output_dir=")
    return composed


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", list(overrides))


def run_here(*arguments: str) -> None:
    """`divflow train` in this process, which costs no start of Python and torch; it ends as the command does."""
    path = list(sys.path)
    try:
        main(["train", *arguments])
    finally:
        sys.path[:] = path
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def run(*overrides: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command(*overrides), capture_output=True, text=True, timeout=timeout, check=False)

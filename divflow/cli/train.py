"""`divflow train`: a run, from its settings to its results."""

import contextlib
import os
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import divflow.sweeps  # noqa: F401 - for the names of folders
from divflow.cli.application import run_application

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Train as `configs/train.yaml` and the arguments say; a sweeper is given the best value of what is monitored."""
    run_application("train", _train, arguments)


def _train(config: DictConfig) -> float | None:
    config.output_dir = HydraConfig.get().runtime.output_dir  # a sweep, or hydra.run.dir=..., may have said another
    try:
        from divflow.build import check_settings  # what is wrong is told before Lightning is imported

        check_settings(config)
        from divflow.experiment import train

        results = train(config)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(config.output_dir)  # where nothing was left
    best = config.callbacks.get("best")
    return None if best is None else results.get(best.monitor)

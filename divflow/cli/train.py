"""`divflow train`: a run, from its settings to its results."""

import contextlib
import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from divflow.runs.folder import check_folder
from divflow.runs.settings import check_settings

__all__ = ["run"]


def run(config: DictConfig) -> float | None:
    """Train, as `configs/train.yaml` composes it.

    Returns:
        The best value of what `callbacks.best` monitors.

    Raises:
        DivflowError: a setting, the data, the field or the solve is not what it needs to be.
    """
    config.output_dir = HydraConfig.get().runtime.output_dir  # a sweep, or hydra.run.dir=..., may have set another
    try:
        check_settings(config)
        check_folder(Path(config.output_dir).expanduser().resolve(), config.ckpt_path, config.overwrite)
        from divflow.runs.experiment import train  # here, so that mistakes are reported before Lightning is imported

        results = train(config)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(config.output_dir)  # where nothing was left
    best = config.callbacks.get("best")
    return None if best is None else results.get(best.monitor)

"""Loggers of a run: `metrics.csv`, and those that the user names."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf

from divflow.saved.build import ConfigError

__all__ = ["build_loggers", "log_settings", "own_wandb_run"]


def build_loggers(config: DictConfig | None, output: Path) -> list[Logger]:
    """Build the logger of `metrics.csv`, and that of a config unless it is the same.

    Raises:
        ConfigError: the logger needs a package that is not installed.
    """
    table = CSVLogger(output, name="", version="")
    if config is None or config._target_.endswith(".CSVLogger"):
        return [table]
    try:
        return [table, instantiate(config, _convert_="all")]
    except InstantiationException as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        package = config._target_.rpartition(".")[2].removesuffix("Logger").lower()
        raise ConfigError(
            f"logger={package} needs the package {package}, which is not installed. Install it: pip install {package}"
        ) from error


@contextlib.contextmanager
def own_wandb_run() -> Iterator[None]:
    """Within it W&B's run begins, and ends with it: the next run of a sweep, in the same process, would be logged to it, too."""
    before = _wandb_run()
    try:
        yield
    finally:
        if before is None and (run := _wandb_run()) is not None:
            run.finish(exit_code=int(sys.exc_info()[0] is not None))


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def log_settings(trainer: L.Trainer, config: DictConfig) -> None:
    """Pass the settings of a run to the loggers that show them; for `metrics.csv`, `config.yaml` has them.

    Raises:
        ConfigError: W&B can't begin a run, such as without being logged in.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            try:
                logger.log_hyperparams(_flat(plain))
            except Exception as error:
                if not type(error).__module__.startswith("wandb."):
                    raise
                raise ConfigError(
                    f"logger=wandb can't begin a run: {error} Run `wandb login`, or set WANDB_MODE=offline"
                ) from error


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat

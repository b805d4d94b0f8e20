"""A run: from a composed config to a trained density, its figures and its results."""

import csv
import functools
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from divflow.build import ConfigError, build_density, build_objective, build_ways
from divflow.checkpoint import check_state, load_state, read_checkpoint
from divflow.data.module import TensorDataModule
from divflow.errors import DivflowError
from divflow.report import print_results
from divflow.tasks.density import UnnormalizedDensity
from divflow.tasks.task import Task

__all__ = ["train"]

# What describes a density, beside its network and the ways to evaluate it.
_FLOW = ("t_base", "t_data")
_SCORE = ("sde", "data_std", "noise_levels", "sampler")


def train(config: DictConfig) -> dict[str, float]:
    """Train, test and report.

    Args:
        config: as `configs/train.yaml` composes it. In its `output_dir` the run leaves `config.yaml` (resolved),
            `metrics.csv`, `checkpoints/`, `figures/` and `samples.npy`.

    Returns:
        The test metrics of the best checkpoint, by name.

    Raises:
        DivflowError: a setting, the data, the field or the solve is not what it needs to be.
        SystemExit: after Ctrl-C (130) or SIGTERM (143), `checkpoints/last.ckpt` written.
    """
    _quieten()
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if config.seed is not None:
        L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data, _convert_="all")
    try:
        task = _build_task(config, data)
    except DivflowError:
        raise
    except ValueError as error:  # from a class that knows nothing of settings
        raise ConfigError(str(error)) from error
    resumed = None if config.ckpt_path is None else read_checkpoint(config.ckpt_path)
    if resumed is not None:
        check_state(task, resumed["state_dict"], config.ckpt_path)
    trainer = _build_trainer(config)
    if trainer.is_global_zero:
        if resumed is not None:
            _take_along(Path(config.ckpt_path), output)
            _resume_metrics(trainer, Path(config.ckpt_path), resumed["global_step"], output)
        OmegaConf.save(config, output / "config.yaml", resolve=True)

    started = time.perf_counter()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to both signals, once its callbacks have saved
        last = output / "checkpoints" / "last.ckpt"
        hint = f"; go on with ckpt_path={last}" if last.is_file() else ""
        print(f"\nstopped after {trainer.global_step} steps{hint}", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None
    seconds = time.perf_counter() - started
    # A checkpoint of the last step was saved before Lightning counted its epoch as completed.
    epochs = trainer.fit_loop.epoch_progress.current
    epochs.completed = epochs.processed

    best = output / "checkpoints" / "best.ckpt"
    if best.is_file() and not trainer.fast_dev_run:
        load_state(task, read_checkpoint(best)["state_dict"], best)
    metrics = trainer.test(task, datamodule=data, verbose=False)[0]
    results = {name: float(value) for name, value in metrics.items()}
    if trainer.is_global_zero:
        print_results(results, seconds, trainer.global_step, output)
    return results


def _build_task(config: DictConfig, data: TensorDataModule) -> Task:
    plain = OmegaConf.to_container(config, resolve=True)
    scored = "objective" in plain
    names = ("network", "estimator", "likelihood", "solver", *(_SCORE if scored else _FLOW))
    density_config = {name: plain[name] for name in names}
    density_config |= {"event_shape": list(data.event_shape), "transform": data.transform.config()}
    if hasattr(data, "columns"):
        density_config["columns"] = list(data.columns)
    density = build_density(density_config)
    make = instantiate(config.task, _partial_=True, _convert_="all")
    # What is loaded back evaluates as the test did, and not as loosely as training.
    make = functools.partial(make, density, config=density_config | plain["evaluation"])
    if config.compile:
        network = density.score_field if isinstance(density, UnnormalizedDensity) else density.flow.velocity
        network.compile()
    if isinstance(density, UnnormalizedDensity):
        return make(objective=build_objective(plain, density))
    evaluation = density.flow.replace(**build_ways(plain["evaluation"]))
    if scored:
        return make(objective=build_objective(plain, density), evaluation=evaluation)
    return make(evaluation=evaluation)


def _build_trainer(config: DictConfig) -> L.Trainer:
    settings = OmegaConf.to_container(config.device, resolve=True) | OmegaConf.to_container(
        config.trainer, resolve=True
    )
    if settings["accelerator"] == "auto" and not torch.cuda.is_available():
        settings["accelerator"] = "cpu"  # MPS has no float64, in which torchdiffeq keeps time
    if settings["accelerator"] == "gpu":
        _check_gpus(settings["devices"])
    callbacks = [
        instantiate(callback, _convert_="all") for callback in config.callbacks.values() if callback is not None
    ]
    return L.Trainer(
        default_root_dir=config.output_dir, logger=_build_logger(config.logger), callbacks=callbacks, **settings
    )


def _check_gpus(devices: int | str | list[int]) -> None:
    there = torch.cuda.device_count()
    numbers = devices if isinstance(devices, list) else range(there if devices in ("auto", -1, "-1") else int(devices))
    if there and all(0 <= int(number) < there for number in numbers):
        return
    build = "" if torch.version.cuda or torch.version.hip else f"torch {torch.__version__} is built without CUDA; "
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    masked = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the others; " if hidden is not None else ""
    remedy = f"use device.devices={there}" if there else "use device=cpu or device=multi_process_cpu"
    raise ConfigError(
        f"device.devices={devices} asks for GPUs of this machine, but torch sees {there or 'none'}; {build}{masked}{remedy}"
    )


def _build_logger(config: DictConfig | None) -> Logger | bool:
    if config is None:
        return False
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        package = config._target_.rpartition(".")[2].removesuffix("Logger").lower()
        raise ConfigError(f"logger={package} needs a package that is not installed: pip install {package}") from error


def _resume_metrics(trainer: L.Trainer, ckpt_path: Path, step: int, output: Path) -> None:
    """Give the logger the rows that the run had logged by its checkpoint's step; it would start with none."""
    earlier = [folder / "metrics.csv" for folder in (output, ckpt_path.parent.parent)]
    rows = next((list(csv.DictReader(path.read_text().splitlines())) for path in earlier if path.is_file()), [])
    kept = [row for row in rows if int(row["step"]) < step and not row.get("test/nll") and not row.get("test/loss")]
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and kept:
            writer = logger.experiment
            writer.metrics_keys = list(kept[0])
            with open(writer.metrics_file_path, "w", newline="") as file:
                table = csv.DictWriter(file, writer.metrics_keys)
                table.writeheader()
                table.writerows(kept)


def _take_along(ckpt_path: Path, output: Path) -> None:
    """The checkpoint, and the best one so far, into the folder of the run that goes on, unless it has its own."""
    for source, name in ((ckpt_path, "last.ckpt"), (ckpt_path.with_name("best.ckpt"), "best.ckpt")):
        here = output / "checkpoints" / name
        if source.is_file() and not here.is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, here)


def _quieten() -> None:
    """Lightning's remarks on hardware and loggers, which say nothing of the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for remark in (
        ".*does not have many workers",
        ".*isinstance\\(treespec, LeafSpec\\)",
        "Experiment logs directory",
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",
        "The number of training batches .* is smaller than the logging interval",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "It is recommended to use .*sync_dist=True",
    ):
        warnings.filterwarnings("ignore", message=remark)

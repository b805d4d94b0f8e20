"""A run: from a composed config to a trained density, its figures and its results."""

import csv
import functools
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from divflow.build import ConfigError, build_density, build_objective, build_ways
from divflow.callbacks import BestCheckpoint
from divflow.callbacks.declared import declared
from divflow.checkpoint import check_state, init_weights, load_state, read_checkpoint, which_weights
from divflow.data.module import TensorDataModule
from divflow.density import ScoreDensity, UnnormalizedDensity
from divflow.errors import DivflowError
from divflow.folder import claim, earlier_metrics, link_latest, save_config, save_results, take_along
from divflow.loggers import build_loggers, log_settings
from divflow.report import print_results
from divflow.tasks.task import Task

__all__ = ["train"]

# What describes a density, beside its network and the ways to evaluate it.
_FLOW = ("t_base", "t_data", "base")
_SCORE = ("sde", "data_std", "noise_levels", "sampler")


def train(config: DictConfig) -> dict[str, float]:
    """Train, test and report.

    Args:
        config: as `configs/train.yaml` composes it. In its `output_dir` the run leaves `config.yaml` (from which it can be
            started again), `metrics.csv`, `results.json`, `checkpoints/`, `figures/` and `samples.npy`.

    Returns:
        The test metrics of the best checkpoint by name, and the validation's value by which it was the best.

    Raises:
        DivflowError: a setting, the data, the field or the solve is not what it needs to be.
        SystemExit: after Ctrl-C (130) or SIGTERM (143), `checkpoints/last.ckpt` written.
    """
    _quieten()
    output = Path(config.output_dir)
    if config.seed is not None:
        if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:  # as Lightning takes it
            raise ConfigError(f"seed must be null or a whole number in [0, 2^32), but is {config.seed!r}")
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
    # A run that goes on has its own weights, wherever it started.
    taken = None if config.init_from is None or resumed is not None else init_weights(task.density, config.init_from)
    trainer = _build_trainer(config)
    if trainer.is_global_zero:
        claim(output, config.ckpt_path, config.overwrite)
        link_latest(output)
        if taken is not None:
            print(f"starting from {taken}; the optimizer starts anew")
        if resumed is not None:
            take_along(Path(config.ckpt_path), output)
            _resume_metrics(trainer, earlier_metrics(Path(config.ckpt_path), resumed["global_step"], output))
        save_config(config, output, f"step {resumed['global_step']} of {config.ckpt_path}" if resumed else "")
        log_settings(trainer, config)

    seconds = _fit(trainer, task, data, config)
    # Processes that were started by themselves may each have thought of a folder; the first one's is the run's.
    best = Path(trainer.strategy.broadcast(str(output / "checkpoints" / "best.ckpt")))
    tested = f"weights of step {trainer.global_step}"
    if best.is_file() and not declared(trainer).fast_dev_run:
        checkpoint = read_checkpoint(best)
        load_state(task, checkpoint["state_dict"], best)
        tested = which_weights(checkpoint, best)
    metrics = trainer.test(task, datamodule=data, verbose=False)[0]
    results = {name: float(value) for name, value in metrics.items()} | _best_value(trainer)
    if trainer.is_global_zero:
        save_results(results, seconds, trainer.global_step, config.seed, output)
        print_results(results, seconds, trainer.global_step, output, tested)
    return results


def _fit(trainer: L.Trainer, task: Task, data: TensorDataModule, config: DictConfig) -> float:
    """Train, and return the seconds that it took."""
    started = time.perf_counter()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to both signals, once its callbacks have saved
        last = Path(config.output_dir) / "checkpoints" / "last.ckpt"
        hint = f"; go on with ckpt_path={last}" if last.is_file() else ""
        print(f"\nstopped after {trainer.global_step} steps{hint}", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None
    seconds = time.perf_counter() - started
    # A checkpoint of the last step was saved before Lightning counted its epoch as completed.
    epochs: Any = trainer.fit_loop.epoch_progress.current
    epochs.completed = epochs.processed
    return seconds


def _build_task(config: DictConfig, data: TensorDataModule) -> Task:
    plain = _plain(config)
    scored = "objective" in plain
    if scored and plain["base"] is not None:
        raise ConfigError("a base is for flows, and a score's is the prior of its SDE; leave it at base=normal")
    names = ("network", "estimator", "likelihood", "solver", *(_SCORE if scored else _FLOW))
    density_config = {name: plain[name] for name in names}
    density_config |= {"event_shape": list(data.event_shape), "transform": data.transform.config()}
    if data.context_features:
        density_config["context_features"] = data.context_features
    if data.context_transform is not None:
        density_config["context_transform"] = data.context_transform.config()
    if hasattr(data, "columns"):
        density_config["columns"] = list(data.columns)
    density = build_density(density_config)
    make = instantiate(config.task, _partial_=True, _convert_="all")
    # What is loaded back evaluates as the test did, and not as loosely as training.
    make = functools.partial(make, density, config=density_config | plain["evaluation"])
    if config.compile:
        network = density.score_field if isinstance(density, UnnormalizedDensity) else density.flow.velocity
        cast(nn.Module, network).compile()
    if isinstance(density, UnnormalizedDensity):
        return make(objective=build_objective(plain, density))
    evaluation = density.flow.replace(**build_ways(plain["evaluation"]))
    if isinstance(density, ScoreDensity):
        return make(objective=build_objective(plain, density), evaluation=evaluation)
    return make(evaluation=evaluation)


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _build_trainer(config: DictConfig) -> L.Trainer:
    settings = _plain(config.device) | _plain(config.trainer)
    if settings["accelerator"] == "auto" and not torch.cuda.is_available():
        settings["accelerator"] = "cpu"  # MPS has no float64, in which torchdiffeq keeps time
    if settings["accelerator"] == "gpu":
        _check_gpus(settings["devices"])
    callbacks = [
        instantiate(callback, _convert_="all") for callback in config.callbacks.values() if callback is not None
    ]
    loggers = build_loggers(config.logger, Path(config.output_dir))
    return L.Trainer(default_root_dir=config.output_dir, logger=loggers, callbacks=callbacks, **settings)


def _best_value(trainer: L.Trainer) -> dict[str, float]:
    """The validation's value of the best checkpoint, by its name."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoint) and callback.monitor and callback.best_model_score is not None:
            return {callback.monitor: float(callback.best_model_score)}
    return {}


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


def _resume_metrics(trainer: L.Trainer, rows: list[dict[str, str]]) -> None:
    """Give the logger the rows that the run had logged by its checkpoint's step; it would start with none."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and rows:
            writer = logger.experiment
            writer.metrics_keys = list(rows[0])
            with open(writer.metrics_file_path, "w", newline="") as file:
                table = csv.DictWriter(file, writer.metrics_keys)
                table.writeheader()
                table.writerows(rows)


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

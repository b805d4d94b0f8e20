"""A run: from a composed config to a trained density, its figures and its results."""

import contextlib
import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from divflow.callbacks.best_checkpoint import BestCheckpoint
from divflow.callbacks.trainer_attributes import declared
from divflow.data.batch import Keys
from divflow.data.split import SplitData
from divflow.errors import DivflowError
from divflow.flow import FlowDensity
from divflow.flow.evaluation_time import EvaluationTimeError
from divflow.runs.compiled import compile_network
from divflow.runs.data import build_data, data_description, manifold_of
from divflow.runs.folder import claim, earlier_metrics, link_latest, save_config, save_results, take_along
from divflow.runs.loggers import build_loggers, log_settings, own_wandb_run
from divflow.runs.report import print_results
from divflow.runs.settings import check_gpus, check_seed
from divflow.runs.signals import exit_code
from divflow.runs.sweeps import going_on
from divflow.runs.types import check_arguments, check_targets_arguments
from divflow.saved.build import ConfigError
from divflow.saved.checkpoint import check_state, init_weights, load_state, read_checkpoint, which_weights
from divflow.score import UnnormalizedDensity
from divflow.tasks.building import build_task
from divflow.tasks.resuming import check_resumed, warn_of_seed
from divflow.tasks.task import Task

__all__ = ["train"]

# Settings of a density besides its network, estimator, likelihood and solver.
_FLOW = ("t_base", "t_data", "base")
_SCORE = ("sde", "data_std", "noise_levels", "sampler")


def train(config: DictConfig) -> dict[str, float]:
    """Train, test and report a run.

    In `output_dir` the run leaves `config.yaml` (from which it can be started again), `metrics.csv`, `results.json`, `checkpoints/`,
    `figures/` and `samples.npy`.

    Args:
        config: as `configs/train.yaml` composes it.

    Returns:
        The test metrics of the best checkpoint by name, and the validation value that made it the best.

    Raises:
        DivflowError: a setting, the data, the field or the solve is not what it needs to be.
        SystemExit: after Ctrl-C (130) or SIGTERM (143), when `checkpoints/last.ckpt` has been written.
    """
    with contextlib.ExitStack() as held:
        return _train(config, held)


def _train(config: DictConfig, held: contextlib.ExitStack) -> dict[str, float]:
    _quieten()
    # A link, such as outputs/latest, leads elsewhere once this run has begun.
    config = config.copy()
    for name in ("output_dir", "ckpt_path", "init_from"):
        if config[name] is not None:
            config[name] = str(Path(config[name]).expanduser().resolve())
    output, ckpt_path = Path(config.output_dir), config.ckpt_path
    check_seed(config.seed)
    if config.seed is not None:
        L.seed_everything(config.seed, workers=True, verbose=False)
    check_targets_arguments(_plain(config))
    check_arguments(L.Trainer, _plain(config.trainer), "trainer")
    check_arguments(L.Trainer, _plain(config.device), "device")
    with _settings_of("callbacks"):
        callbacks = _build_callbacks(config)
    with _settings_of("data"):
        data, keys = build_data(_plain(config.data))
    with _settings_of("task"):
        task = _build_task(config, data, keys)
        task.configure_optimizers()  # which refuses wrong optimizers and schedules
    resumed = None if ckpt_path is None else read_checkpoint(ckpt_path)
    if resumed is not None:
        check_state(task, resumed["state_dict"], ckpt_path)
        if isinstance(data, SplitData):
            data.check_columns(resumed.get(type(data).__qualname__, {}))
    # A resumed run has its own weights, wherever it started.
    taken = (
        None
        if config.init_from is None or resumed is not None
        else init_weights(task.density, config.init_from, config.weights)
    )
    held.enter_context(own_wandb_run())
    with _settings_of("trainer, device or logger"):
        trainer = _build_trainer(config, callbacks)
    if resumed is not None:  # before anything is written; training itself warns of the rest
        with warnings.catch_warnings(action="ignore"):
            check_resumed(task, declared(trainer).callbacks, resumed)
    if trainer.is_global_zero:
        held.enter_context(claim(output, ckpt_path, 0 if resumed is None else resumed["global_step"], config.overwrite))
        # Only when training starts: until then the run's other processes resolve their settings, which may name this link.
        declared(trainer).callbacks.append(LambdaCallback(on_train_start=lambda *_: link_latest(output)))
        if taken is not None:
            print(f"starting from {taken}; the optimizer starts anew")
        if resumed is not None:
            warn_of_seed(config.seed, resumed)
            take_along(Path(ckpt_path), output)
            _resume_metrics(trainer, earlier_metrics(Path(ckpt_path), resumed["global_step"], output))
        save_config(config, output, f"step {resumed['global_step']} of {ckpt_path}" if resumed else "")
        log_settings(trainer, config)

    seconds = _fit(trainer, task, data, config)
    with _stoppable(output, lambda: f"in the test, after {trainer.global_step} steps"):
        results, tested = _test(trainer, task, data, config)
    if trainer.is_global_zero:
        link_latest(output)  # a run that was resumed with no step left has not begun to train
        seed, before = (
            (config.seed, 0) if resumed is None else (resumed.get("noise_seed", config.seed), resumed["global_step"])
        )
        save_results(results, seconds, trainer.global_step, seed, output, before)
        print_results(results, seconds, trainer.global_step, output, tested, before)
        if trainer.global_step == 0:
            print("No step was trained, so there is no checkpoint. Set trainer.max_steps to a positive number")
    return results


@contextlib.contextmanager
def _settings_of(group: str) -> Iterator[None]:
    """Report errors of the classes that a group of settings builds as errors of these settings.

    Raises:
        ConfigError: with the message of the error.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MisconfigurationException) as error:
        if isinstance(error, DivflowError):
            raise
        raise ConfigError(f"the settings of {group} are refused: {error}") from error


def _fit(trainer: L.Trainer, task: Task, data: L.LightningDataModule, config: DictConfig) -> float:
    """Train, and return the seconds that this took."""
    started = time.perf_counter()
    try:
        with _stoppable(Path(config.output_dir), lambda: f"after {trainer.global_step} steps"):
            trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
    except MisconfigurationException as error:  # by Lightning, if the monitored value does not exist
        raise ConfigError(str(error)) from error
    except RuntimeError as error:  # Lightning's, which names an argument of its Trainer
        if "parameters that were not used" not in str(error):
            raise
        unused = [name for name, it in task.density.named_parameters() if it.requires_grad and it.grad is None]
        named = f" ({', '.join(unused[:5])}{' and more' if len(unused) > 5 else ''})" if unused else ""
        raise ConfigError(
            f"the loss does not depend on some parameters of the network{named}, for whose gradients the other processes wait. Remove "
            "them from the network, or use device.strategy=ddp_find_unused_parameters_true"
        ) from error
    seconds = time.perf_counter() - started
    # A checkpoint of the last step was saved before Lightning counted it, and its epoch; the test is logged after both.
    epochs: Any = trainer.fit_loop.epoch_progress.current
    epochs.completed = epochs.processed = epochs.ready
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
    return seconds


def _test(
    trainer: L.Trainer, task: Task, data: L.LightningDataModule, config: DictConfig
) -> tuple[dict[str, float], str]:
    """Test the best weights: their test and validation values by name, and a description of the weights."""
    # Processes that were started one by one may have different folders; that of the first is the run's.
    best = Path(trainer.strategy.broadcast(str(Path(config.output_dir) / "checkpoints" / "best.ckpt")))
    validated, tested = _best_value(trainer), f"weights of step {trainer.global_step}"
    if best.is_file() and not declared(trainer).fast_dev_run:
        if validated:
            validated |= _current_value(trainer, task, data, best, *validated)
        checkpoint = read_checkpoint(best, weights=config.weights)
        load_state(task, checkpoint["state_dict"], best)
        tested = which_weights(checkpoint, best)
    metrics = trainer.test(task, datamodule=data, verbose=False)[0]
    return {name: float(value) for name, value in metrics.items()} | validated, tested


def _current_value(
    trainer: L.Trainer, task: Task, data: L.LightningDataModule, best: Path, monitor: str
) -> dict[str, float]:
    """Validation value of the current weights, if the checkpoint was chosen by averaged ones; otherwise empty."""
    checkpoint = read_checkpoint(best, weights="current")
    if "weights" not in checkpoint:
        return {}
    load_state(task, checkpoint["state_dict"], best)
    loggers, trainer.loggers = trainer.loggers, []  # this validation is no part of the learning curve
    try:
        values = trainer.validate(task, datamodule=data, verbose=False)[0]
    finally:
        trainer.loggers = loggers
    return {f"{monitor}_current_weights": float(values[monitor])} if monitor in values else {}


@contextlib.contextmanager
def _stoppable(output: Path, where: Callable[[], str]) -> Iterator[None]:
    """Around a part of a run that a signal or a limit may stop: print where it stopped, and how to go on."""
    try:
        yield
    except (SystemExit, EvaluationTimeError) as stop:  # Lightning's answer to signals, once its callbacks have saved
        last = output / "checkpoints" / "last.ckpt"
        hint = f"; {going_on(str(last))}" if last.is_file() else ""
        print(f"\nstopped {where()}{hint}", file=sys.stderr)
        if isinstance(stop, EvaluationTimeError):
            raise
        raise SystemExit(exit_code(stop)) from None


def _build_task(config: DictConfig, data: L.LightningDataModule, keys: Keys | None = None) -> Task:
    plain = _plain(config)
    scored = "objective" in plain
    if scored and plain["base"] is not None:
        raise ConfigError("a base is for flows; the base of a score is the prior of its SDE. Leave it at base=normal")
    names = ("network", "features", *(_SCORE if scored else _FLOW))
    density_config = {name: plain[name] for name in names}
    density_config |= data_description(data, keys, plain["network"])
    if (manifold := manifold_of(data, plain["manifold"])) is not None:
        density_config["manifold"] = manifold
    names = ("estimator", "likelihood", "solver")
    ways, evaluation = ({name: it[name] for name in names} for it in (plain, plain["evaluation"]))
    described = {name: plain[name] for name in ("objective", "times")} if scored else {}
    described |= {"training": ways} | ({} if keys is None else {"keys": keys})
    # A loaded density evaluates as the test did, not with the looser settings of training.
    task = build_task(density_config | evaluation | {"task": plain["task"] | described})
    if config.compile:
        compile_network(cast(FlowDensity | UnnormalizedDensity, task.density))
    return task


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _build_callbacks(config: DictConfig) -> list[L.Callback]:
    return [instantiate(callback, _convert_="all") for callback in config.callbacks.values() if callback is not None]


def _build_trainer(config: DictConfig, callbacks: list[L.Callback]) -> L.Trainer:
    settings = _plain(config.device) | _plain(config.trainer)
    if settings["accelerator"] == "auto" and not torch.cuda.is_available():
        settings["accelerator"] = "cpu"  # MPS has no float64, in which torchdiffeq keeps time
    if settings["accelerator"] == "gpu":
        check_gpus(settings["devices"])
    # Without divflow's bar Lightning would show its own.
    settings.setdefault("enable_progress_bar", config.callbacks.get("progress") is not None)
    loggers = build_loggers(config.logger, Path(config.output_dir))
    return L.Trainer(default_root_dir=config.output_dir, logger=loggers, callbacks=callbacks, **settings)


def _best_value(trainer: L.Trainer) -> dict[str, float]:
    """The validation's value of the best checkpoint, by its name."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoint) and callback.monitor and callback.best_model_score is not None:
            return {callback.monitor: float(callback.best_model_score)}
    return {}


def _resume_metrics(trainer: L.Trainer, rows: list[dict[str, str]]) -> None:
    """Give the logger the rows that the run had logged by the step of its checkpoint; it would start with none."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and rows:
            writer = logger.experiment
            writer.metrics_keys = list(rows[0])
            with open(writer.metrics_file_path, "w", newline="") as file:
                table = csv.DictWriter(file, writer.metrics_keys)
                table.writeheader()
                table.writerows(rows)


def _quieten() -> None:
    """Silence Lightning's remarks on hardware and loggers, which do not concern the run."""
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

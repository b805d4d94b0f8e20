"""Loggers beside `metrics.csv` get settings and figures; `metrics.csv` is always there."""

import os

import lightning as L
import pytest
from lightning.pytorch.loggers import Logger
from run import DRAWN, SMALL_TOY, config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from divflow.runs.experiment import train
from divflow.runs.loggers import build_loggers, log_settings
from divflow.saved.build import ConfigError

SMALL = [*DRAWN, *SMALL_TOY, "callbacks.figures.num_samples=50"]


def test_tensorboard_gets_metrics_settings_and_figures(tmp_path):
    train(config(*SMALL, "logger=tensorboard", f"output_dir={tmp_path}"))
    assert (tmp_path / "metrics.csv").is_file()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"final", "curve"}
    assert {"train/nll", "val/nll", "test/nll"} <= set(events.Tags()["scalars"])
    text = (tmp_path / "tensorboard" / "hparams.yaml").read_text()
    assert "estimator._target_: divflow.divergence.Exact" in text
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_one_table_of_metrics(tmp_path):
    settings = config("logger=csv", f"output_dir={tmp_path}")
    (logger,) = build_loggers(settings.logger, tmp_path)
    assert os.path.samefile(logger.log_dir, tmp_path)
    assert len(build_loggers(None, tmp_path)) == 1


def test_a_logger_without_its_package_says_how_to_install_it(tmp_path, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(ConfigError, match="logger=tensorboard needs the package tensorboard.*pip install tensorboard"):
        build_loggers(config("logger=tensorboard", f"output_dir={tmp_path}").logger, tmp_path)


def test_wandb_without_an_account_says_what_to_do(tmp_path):
    class UsageError(Exception):
        __module__ = "wandb.errors.errors"

    class LoggedOut(Logger):
        name, version = "", ""

        def log_hyperparams(self, params):
            raise UsageError("No API key configured.")

        def log_metrics(self, metrics, step=None): ...

    trainer = L.Trainer(logger=LoggedOut())
    with pytest.raises(ConfigError, match="No API key configured. Run `wandb login`, or set WANDB_MODE=offline"):
        log_settings(trainer, config(f"output_dir={tmp_path}"))

"""Learning rate schedules of tasks: those that step after every optimizer step, and those that follow a validation's value."""

import math
from collections.abc import Mapping

import lightning as L
from lightning.pytorch.utilities.types import LRSchedulerConfigType, LRSchedulerTypeUnion
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from divflow.tasks.errors import TaskError

__all__ = ["check_schedules", "follow_validation", "stepping"]


def stepping(scheduler: LRSchedulerTypeUnion) -> LRSchedulerConfigType:
    """A schedule as Lightning is to keep it: in checkpoints, and stepped with the optimizer.

    Lightning would step one that follows a value after each optimizer step, too, by a value of long ago or of none; the task steps it
    after each validation.
    """
    return {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}


def check_schedules(trainer: L.Trainer) -> None:
    """Before the first step: schedules must come to their steps, and not to more than they have.

    Raises:
        TaskError: one follows validations and there are none, or one ends before training does.
    """
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, ReduceLROnPlateau) and not trainer.enable_validation:
            raise TaskError(
                "ReduceLROnPlateau steps after each validation, but there is none. Give fit a validation loader without "
                f"limit_val_batches={trainer.limit_val_batches!r}, or use another scheduler"
            )
        steps = trainer.estimated_stepping_batches
        if isinstance(scheduler, OneCycleLR) and math.isfinite(steps) and scheduler.total_steps < steps:
            raise TaskError(
                f"OneCycleLR has total_steps={scheduler.total_steps}, after which it can't step, but training takes {steps:g} steps. Give it "
                f"total_steps={steps:g} (by the command task.scheduler.total_steps=${{trainer.max_steps}})"
            )


def follow_validation(trainer: L.Trainer, monitor: str, values: Mapping[str, Tensor]) -> None:
    """Step the schedules that follow a value, after a validation of training.

    Args:
        trainer: whose schedules.
        monitor: name of the value.
        values: what the validation logged, by name.

    Raises:
        TaskError: there is no such value.
    """
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        if monitor not in values:
            raise TaskError(
                f"ReduceLROnPlateau follows monitor={monitor!r}, but validation logs no such value. Choose one of {', '.join(sorted(values))}"
            )
        config.scheduler.step(values[monitor].item())

"""Learning rate schedules of tasks: those that step after every optimizer step, and those that follow a validation value."""

import math
from collections.abc import Mapping

import lightning as L
from lightning.pytorch.utilities.types import LRSchedulerConfigType, LRSchedulerTypeUnion
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from divflow.tasks.errors import TaskError

__all__ = ["check_schedules", "follow_validation", "stepping"]


def stepping(scheduler: LRSchedulerTypeUnion) -> LRSchedulerConfigType:
    """Describe a schedule for Lightning, so that it is saved in checkpoints and steps with the optimizer.

    A schedule that follows a value is stepped by the task after each validation. Lightning would step it after each optimizer
    step, with an old value or none.
    """
    return {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}


def check_schedules(trainer: L.Trainer) -> None:
    """Check before the first step that schedules get their steps, and not more than they have.

    Raises:
        TaskError: a schedule follows validations and there are none, or it ends before training does.
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
    """Step the schedules that follow a value, after a validation during training.

    Args:
        trainer: owner of the schedules.
        monitor: name of the value.
        values: logged values of the validation, by name.

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

"""Time of validation and test: predicted before it is spent, and limited."""

import contextlib
import math
from typing import Any, cast

import lightning as L
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from divflow.errors import check_positive
from divflow.flow import FlowDensity
from divflow.flow.evaluation_time import expect, limited
from divflow.tasks.task import Task

__all__ = ["EvaluationTime"]

_CHEAPER = (
    "Fewer rows (data.num_val, data.val_fraction, +trainer.limit_val_batches), fewer validations (trainer.val_check_interval), estimates "
    "(estimator@evaluation.estimator=hutchinson) or a network whose divergence has a closed form, as network=mlp and hollow_mlp have, take less"
)
_SETTING = "evaluation.max_minutes"


class EvaluationTime(L.Callback):
    """Report how long a validation or test will take if that exceeds a minute, and limit each.

    The time of the validation is reported before the first training step, and refused there if it exceeds the limit.

    Args:
        max_minutes: limit of one validation or one test; None for no limit.

    Raises:
        ValueError: the limit is not positive.
        EvaluationTimeError: in training or test, an evaluation would exceed the limit, or has exceeded it.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        if max_minutes is not None:
            check_positive("max_minutes, unless it is None,", max_minutes)
        self.max_minutes = max_minutes
        self._held = contextlib.ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predict the time of a validation from one of its batches."""
        if trainer.enable_validation:
            self._expect(trainer, pl_module, trainer.val_dataloaders, sum(trainer.num_val_batches), "each validation")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._held.enter_context(limited(self.max_minutes, "the validation", _CHEAPER, _SETTING))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predict the time of the test from one of its batches, and start the clock."""
        self._expect(trainer, pl_module, trainer.test_dataloaders, sum(trainer.num_test_batches), "the test")
        self._held.enter_context(limited(self.max_minutes, "the test", _CHEAPER, _SETTING))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._held.close()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._held.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop the clock."""
        self._held.close()

    def _expect(self, trainer: L.Trainer, module: L.LightningModule, data: Any, batches: float, what: str) -> None:
        task = cast(Task, module)
        density = task.evaluated_density
        loaders = [loader for loader in tree_leaves(data) if isinstance(loader, DataLoader)]
        if not loaders or not isinstance(density, FlowDensity) or not 0 < batches < math.inf:
            return
        parts = task.parts(trainer.strategy.batch_to_device(next(iter(loaders[0]))))
        rows = min(int(batches) * len(parts.x), sum(len(cast(Any, loader.dataset)) for loader in loaders))
        draws = task.data.num_draws if what == "the test" and task.data is not None else 1
        with task.evaluating():
            notice = expect(density, parts.x, parts.context, rows * draws, what, self.max_minutes, _CHEAPER, _SETTING)
        if notice and trainer.is_global_zero:
            print(notice, flush=True)

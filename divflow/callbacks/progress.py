"""Lightning's progress bar for a whole run, with numbers that are fetched from the device only when they are logged."""

import contextlib
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import TaskID

from divflow.callbacks.trainer_attributes import declared
from divflow.operators.progress import watched

__all__ = ["ProgressBar"]

# Not logged with `prog_bar=True`, with which Lightning fetches them at each step, and the host waits for it.
_SHOWN = ("train/nll", "train/loss", "train/nfe")
_SECONDS = 0.5  # between two updates within a batch


class ProgressBar(RichProgressBar):
    """`RichProgressBar` that counts the steps of the run and shows what the task logs, as of the last logged step.

    Lightning's bar counts the batches of an epoch, of which a run may have thousands. In validation and test, where one batch may
    take minutes, this one shows how many of the batch's nodes and products are done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._training: dict[str, float] = {}
        self._parts: dict[str, str] = {}
        self._looked = 0.0
        self._watching = contextlib.ExitStack()

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Values that the bar shows."""
        if trainer.training and trainer.global_step % declared(trainer).log_every_n_steps == 0:
            logged = trainer.callback_metrics
            self._training = {name: logged[name].item() for name in _SHOWN if name in logged}
        shown = super().get_metrics(trainer, pl_module) | self._training
        shown.pop("v_num", None)
        return shown

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to show nodes and products."""
        super().on_validation_start(trainer, pl_module)
        self._watching.enter_context(watched(lambda *part: self._show(trainer, "val_progress_bar_id", *part)))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to show nodes and products."""
        super().on_test_start(trainer, pl_module)
        self._watching.enter_context(watched(lambda *part: self._show(trainer, "test_progress_bar_id", *part)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop showing nodes and products."""
        self._look_away(self.val_progress_bar_id, self.validation_description)
        super().on_validation_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop showing nodes and products."""
        self._look_away(self.test_progress_bar_id, self.test_description)
        super().on_test_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop showing nodes and products."""
        self._watching.close()
        super().on_exception(trainer, pl_module, exception)

    def _show(self, trainer: L.Trainer, bar: str, what: str, done: int, total: int) -> None:
        """Show the progress of a batch beside the name of its bar."""
        self._parts[what] = f"{done} of {total} {what}"
        number, now = getattr(self, bar), time.monotonic()
        if number is None or self.progress is None or now - self._looked < _SECONDS:
            return
        self._looked = now
        name = self.test_description if trainer.testing else self.validation_description
        self.progress.update(number, description=f"{name} ({', '.join(self._parts.values())})")
        self.refresh()

    def _look_away(self, number: TaskID | None, name: str) -> None:
        self._watching.close()
        self._parts = {}
        if number is not None and self.progress is not None:
            self.progress.update(number, description=name)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the bar, which serves all epochs."""
        if self.is_enabled and self.train_progress_bar_id is None:
            self.train_progress_bar_id = self._add_task(trainer.estimated_stepping_batches, "Training")
            # The speed counts the steps from here on.
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the number of steps so far."""
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

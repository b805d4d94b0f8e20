"""Lightning's progress bar: of the whole run, with numbers that are fetched from the device when they are logged."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from divflow.callbacks.declared import declared

__all__ = ["ProgressBar"]

# Not logged with `prog_bar=True`, with which Lightning fetches them at each step, and the host waits for it.
_SHOWN = ("train/nll", "train/loss", "train/nfe")


class ProgressBar(RichProgressBar):
    """`RichProgressBar` that counts the steps of the run, and shows what divflow's tasks log, as of the last logged step.

    Lightning's counts the batches of an epoch, of which a run by steps may have thousands.
    """

    def __init__(self) -> None:
        super().__init__()
        self._training: dict[str, float] = {}

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What is shown."""
        if trainer.training and trainer.global_step % declared(trainer).log_every_n_steps == 0:
            logged = trainer.callback_metrics
            self._training = {name: logged[name].item() for name in _SHOWN if name in logged}
        shown = super().get_metrics(trainer, pl_module) | self._training
        shown.pop("v_num", None)
        return shown

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on: one bar serves all epochs."""
        if self.is_enabled and self.train_progress_bar_id is None:
            self.train_progress_bar_id = self._add_task(trainer.estimated_stepping_batches, "Training")
            # Time is reckoned from the steps that are taken from here on.
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the steps so far."""
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

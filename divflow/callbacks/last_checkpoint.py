"""The checkpoint from which a run is resumed."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from divflow.callbacks.atomic_files import save_whole
from divflow.callbacks.processes import Processes
from divflow.callbacks.trainer_attributes import declared

__all__ = ["LastCheckpoint"]

# Steps after which several processes agree on the time.
_STEPS_BETWEEN_LOOKS = 10


class LastCheckpoint(Checkpoint):
    """Keep `last.ckpt` up to date: every N steps or M minutes, at the end, and when Ctrl-C or SIGTERM stops the run.

    - It is written only where a resumed run continues exactly as this one would: after an optimizer step, and after validation
      where one is due.
    - It is replaced completely or not at all.
    - An error leaves it as it is, since the weights that led to the error are not those to resume from.

    Args:
        dirpath: folder of the checkpoint.
        every_n_steps: steps of the optimizer between two writes.
        every_n_minutes: minutes of training between two writes; None for no limit in time.

    Raises:
        WriteError: in training, the file can't be written.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int = 100, every_n_minutes: float | None = None) -> None:
        self.path, self.every_n_steps, self.every_n_minutes = (
            Path(dirpath) / "last.ckpt",
            every_n_steps,
            every_n_minutes,
        )
        self._saved_step, self._saved_time, self._due = 0, time.monotonic(), False

    @property
    def last_good(self) -> Path:
        """Path of the last checkpoint with finite weights."""
        return self.path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting steps and minutes."""
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check whether N steps or M minutes are over, except while gradients are accumulated, which would be lost."""
        stepped = trainer.global_step != self._saved_step and not trainer.fit_loop.epoch_loop._should_accumulate()
        stopped = any(callback.stop for callback in declared(trainer).callbacks if isinstance(callback, Processes))
        self._due = self._due or (stepped and (stopped or self._is_due(trainer)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation that was due, which the resumed run would otherwise miss."""
        if self._due and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save once the previous step has been logged."""
        if self._due:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Uncount the batch that is about to begin, which has not been trained on."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            count["ready"] = min(count["ready"], count["processed"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save when training ends."""
        out_of_steps = trainer.global_step >= trainer.max_steps > 0
        out_of_epochs = trainer.current_epoch + 1 == trainer.max_epochs
        if out_of_steps or out_of_epochs or trainer.should_stop:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save where the run was stopped, unless that was within a step."""
        between_steps = all(
            callback.stopping for callback in declared(trainer).callbacks if isinstance(callback, Processes)
        )
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.training and between_steps:
            self._save(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        if trainer.global_step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._saved_time > 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return late
        return trainer.global_step % _STEPS_BETWEEN_LOOKS == 0 and trainer.strategy.broadcast(late)

    def _save(self, trainer: L.Trainer) -> None:
        self._due = False
        if trainer.global_step != self._saved_step and not declared(trainer).fast_dev_run:
            self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
            with save_whole(trainer, self.path) as part:
                trainer.save_checkpoint(part, weights_only=False)

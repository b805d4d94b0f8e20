"""The checkpoint that a run is resumed from."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Keep `last.ckpt` up to date: every N steps, at the end, and when Ctrl-C or SIGTERM ends the run.

    An error leaves it as it is: the weights that led to the error are not what to resume from.

    Args:
        dirpath: folder.
        every_n_steps: of the optimizer.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int = 100) -> None:
        self.path, self.every_n_steps = Path(dirpath) / "last.ckpt", every_n_steps
        self._saved_step = -1

    @property
    def last_good(self) -> Path:
        """Where the last weights are that were finite: an error is not saved."""
        return self.path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every N steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save when training ends."""
        out_of_steps = trainer.global_step >= trainer.max_steps > 0
        out_of_epochs = trainer.current_epoch + 1 == trainer.max_epochs
        if out_of_steps or out_of_epochs or trainer.should_stop:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save where the run was interrupted."""
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.state.fn == "fit":
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.path, weights_only=False)

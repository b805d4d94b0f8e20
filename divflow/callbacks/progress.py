"""Lightning's progress bar, whose numbers are fetched from the device when they are logged."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

__all__ = ["ProgressBar"]


class ProgressBar(RichProgressBar):
    """`RichProgressBar` that shows the metrics of the last logged step: fetching those of each makes the host wait for it."""

    _shown: dict[str, int | str | float | dict[str, float]] = {}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """The metrics, of this step if it is logged."""
        if not trainer.training or trainer.global_step % trainer.log_every_n_steps == 0:
            self._shown = super().get_metrics(trainer, pl_module)
        return self._shown

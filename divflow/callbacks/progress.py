"""Lightning's progress bar, whose numbers are fetched from the device when they are logged."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from divflow.callbacks.declared import declared

__all__ = ["ProgressBar"]

# Not logged with `prog_bar=True`, with which Lightning fetches them at each step, and the host waits for it.
_SHOWN = ("train/nll", "train/loss", "train/nfe")


class ProgressBar(RichProgressBar):
    """`RichProgressBar` with what divflow's tasks log while training, as of the last logged step."""

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
        return super().get_metrics(trainer, pl_module) | self._training

"""Lightning's exponential moving average of the weights, made safe to interrupt."""

import contextlib
from collections.abc import Iterator

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging

__all__ = ["WeightAverage"]


class WeightAverage(EMAWeightAveraging):
    """`EMAWeightAveraging` that puts the current weights back when validation is interrupted.

    Averaged and current weights are swapped for validation; a checkpoint saved then would hold one for the other.
    """

    _swapped = False

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the averaged weights."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the current weights."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the current weights back before the last checkpoint is saved."""
        if self._swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    @contextlib.contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The averaged weights in place of the current ones, while training is at rest."""
        if self._average_model is None:
            yield
            return
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

"""Lightning's exponential moving average of the weights, made safe to interrupt."""

import contextlib
from collections.abc import Callable, Iterator

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["WeightAverage"]


class _Average(AveragedModel):
    """torch's, which asks the device twice an update whether there has been one before; this one remembers."""

    avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor]  # which `EMAWeightAveraging` always gives
    _begun = False

    def update_parameters(self, model: nn.Module) -> None:
        """Let the average follow the model."""
        if not self._begun:
            super().update_parameters(model)
            self._begun = True
            return
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(model.parameters())
        with torch.no_grad():
            if self.use_buffers:
                averaged += self.module.buffers()
                current += model.buffers()
            else:
                for buffer, source in zip(self.module.buffers(), model.buffers(), strict=True):
                    buffer.copy_(source)
            for average, value in zip(averaged, current, strict=True):
                average.copy_(self.avg_fn(average, value.to(average.device), self.n_averaged))
            self.n_averaged += 1


class WeightAverage(EMAWeightAveraging):
    """`EMAWeightAveraging` that puts the current weights back when validation is interrupted.

    Averaged and current weights are swapped for validation; a checkpoint saved then would hold one for the other.
    What is tested after training are the averaged weights, also where a resumed run has no step left to train.
    """

    _swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average, of a kind that does not wait for the device."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._average_model = _Average(
                pl_module, self._device or pl_module.device, use_buffers=self._use_buffers, **self._kwargs
            )

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

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the averaged weights; Lightning does so at the end of training, which does not come without a step."""
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)

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

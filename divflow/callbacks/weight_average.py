"""Lightning's exponential moving average of the weights, made safe to interrupt."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
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


class _Warming:
    """The average after one more update; a class, since functions within functions can't be pickled."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, average: Tensor, value: Tensor, updates: Tensor | int) -> Tensor:
        decay = (updates + 1) / (updates + 10)
        limit = decay.clamp(max=self.decay) if isinstance(decay, Tensor) else min(decay, self.decay)
        return value + limit * (average - value)


class WeightAverage(EMAWeightAveraging):
    """`EMAWeightAveraging` whose decay warms up, and that puts the current weights back when validation is interrupted.

    After n updates the decay is `min(decay, (1 + n) / (10 + n))` (as TensorFlow's `ExponentialMovingAverage(num_updates=n)`): the average is
    over the last tenth of a short run, and not of weights that had hardly been trained. Averaged and current weights are swapped
    for validation; a checkpoint saved then would hold one for the other.

    Args:
        decay: of a long run.
        warm_up: whether the decay does.
        leaves: which weights training leaves in the model, "averaged" or "current", also where a resumed run has no step left.
        settings: others of `EMAWeightAveraging`.
    """

    _swapped = False

    def __init__(self, decay: float = 0.99, warm_up: bool = True, leaves: str = "averaged", **settings: Any) -> None:
        super().__init__(decay=decay, **settings)
        self.leaves = leaves
        if warm_up:
            self._kwargs["avg_fn"] = _Warming(decay)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average, of a kind that does not wait for the device."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._average_model = _Average(
                pl_module, self._device or pl_module.device, use_buffers=self._use_buffers, **self._kwargs
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the averaged weights while training; `trainer.validate` is asked for those that the model has."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the current weights."""
        if self._swapped:
            super().on_validation_epoch_end(trainer, pl_module)
            self._swapped = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the current weights back before the last checkpoint is saved."""
        if self._swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: Lightning would leave the averaged weights, but training does not end where it does not begin."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the averaged weights."""
        if self._average_model is not None and self.leaves == "averaged":
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

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
    """Average the weights exponentially: `EMAWeightAveraging`, with a decay that warms up, made safe to interrupt.

    After n updates the decay is

        min(decay, (1 + n) / (10 + n))

    as in TensorFlow's `ExponentialMovingAverage(num_updates=n)`. A short run is then averaged over its last tenth, and not over weights
    that had hardly been trained. Averaged and current weights are swapped for validation; when that is interrupted, the
    current ones are restored before a checkpoint is saved.

    Args:
        decay: decay of a long run.
        warm_up: whether the decay warms up.
        leaves: weights that training leaves in the model, "averaged" or "current", also if a resumed run has no step left.
        settings: other arguments of `EMAWeightAveraging`.
    """

    _swapped = False

    def __init__(self, decay: float = 0.99, warm_up: bool = True, leaves: str = "averaged", **settings: Any) -> None:
        super().__init__(decay=decay, **settings)
        self.leaves = leaves
        if warm_up:
            self._kwargs["avg_fn"] = _Warming(decay)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make an average that does not wait for the device."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._average_model = _Average(
                pl_module, self._device or pl_module.device, use_buffers=self._use_buffers, **self._kwargs
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the averaged weights in training; `trainer.validate` evaluates those that the model has."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the current weights."""
        if self._swapped:
            super().on_validation_epoch_end(trainer, pl_module)
            self._swapped = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the current weights before the last checkpoint is saved."""
        if self._swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing. Lightning would leave the averaged weights here, but does not come here if no step is left."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the weights that `leaves` names."""
        if self._average_model is not None and self.leaves == "averaged":
            self._copy_average_to_current(pl_module)

    @contextlib.contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Hold the averaged weights within this context, while training is at rest."""
        if self._average_model is None:
            yield
            return
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

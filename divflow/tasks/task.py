"""What all training tasks share: optimizer, judging by averages with standard errors, checkpoints, a stop at NaN."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.module import Batch, TensorDataModule
from divflow.data.order import combined_seed
from divflow.density import FlowDensity, UnnormalizedDensity
from divflow.errors import DivflowError
from divflow.tasks.judging import judge_likelihood
from divflow.tasks.metrics import MeanWithStandardError, summarized

__all__ = ["Task", "TrainingError"]

# What noise is for.
_TRAINING, _JUDGING = 0, 1


class TrainingError(DivflowError, RuntimeError):
    """Training left the finite numbers."""


class Task(L.LightningModule):
    """A density that is trained. A subclass implements `loss`, `check` and `judge`, and is told what to log.

    Args:
        density: what is trained and saved, a module.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, stepped after every
            training step; None for none.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density.
    """

    def __init__(
        self,
        density: nn.Module,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        config: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self.density = density
        self._optimizer, self._scheduler, self._config = optimizer, scheduler, config
        self._checked = False
        self._noise_seed: int | None = None
        # Of the batches since the last optimizer step: number and loss.
        self._losses: list[tuple[int, Tensor]] = []
        self._metrics: dict[str, MeanWithStandardError] = {}

    @property
    @abstractmethod
    def judged(self) -> FlowDensity | UnnormalizedDensity:
        """The density as validation and test evaluate it."""

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Before the first step: what is trained must be a field, and treat the samples independently."""

    def check_judged(self, batch: Batch) -> None:
        """Before the first step, in evaluation mode: what is judged must hide no derivative, which it may do there alone."""
        self.check(batch)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of a training batch, a scalar, and its logs."""

    @abstractmethod
    def judge(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """Values per sample of a validation or test batch, by name, to be averaged; None is left out."""

    @property
    def data(self) -> TensorDataModule | None:
        """The data module, where it is one of divflow's."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TensorDataModule) else None

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule by steps."""
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"}}

    def on_fit_start(self) -> None:
        """Fix what all noise of the run comes from, for all processes."""
        if self._noise_seed is None:
            self._noise_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Noise of the batch's own, whatever was drawn before: that of a run that never stopped.

        Raises:
            FieldError: at the first step, the field mixes the samples of a batch, or is none.
        """
        if not self._checked:
            self.check(batch)
            with self._evaluating():
                self.check_judged(batch)
            self._checked = True
        self._seed(_TRAINING, self.current_epoch, batch_idx)

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise at each validation."""
        self._seed(_JUDGING, batch_idx)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise as in validation."""
        self._seed(_JUDGING, batch_idx)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within it all modules are in evaluation mode; after it, each as it was."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _seed(self, *numbers: int) -> None:
        seed = torch.initial_seed() if self._noise_seed is None else self._noise_seed
        torch.manual_seed(combined_seed(seed, self.global_rank, *numbers))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(batch)
        self._losses.append((batch_idx, loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse losses and gradients that would make the weights NaN, so that a saved checkpoint is a good one.

        Losses and gradient are looked at together: each look makes the host wait for the device.

        Raises:
            TrainingError: one of them is not finite.
        """
        checked = [("loss", batch_idx, loss) for batch_idx, loss in self._losses]
        self._losses = []
        if self.trainer.precision != "16-mixed":  # whose loss scaling overflows now and then, and skips that step
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients).to(self.device)
            checked.append(("gradient", self.trainer.fit_loop.batch_idx, norm))
        self._stop_unless_finite(checked)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation averages."""
        self._average("val", self.judge(batch, batch_idx))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test averages."""
        self._average("test", self.judge(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Log the validation averages."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the test averages and their standard errors."""
        self._report("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what `divflow.load` needs to rebuild the density."""
        if self._config is not None:
            checkpoint["divflow"] = self._config
        checkpoint["noise_seed"] = self._noise_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the noise of the run that was saved."""
        self._noise_seed = checkpoint.get("noise_seed")

    def count(self, number: int) -> Tensor:
        """A number to log, filled in on the device: Lightning would copy it there, for which the host waits."""
        return torch.full((), float(number), device=self.device)

    def judge_likelihood(self, density: FlowDensity, batch: Batch) -> dict[str, Tensor | None]:
        """What a batch's log-density gives `judge`; in the test, of as many draws of noise as the data say."""
        data = self.data
        draws = data.num_draws if data is not None and self.trainer.testing else 1
        return judge_likelihood(density, batch, data, draws)

    def _average(self, stage: str, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            if value is not None:
                key = f"{stage}/{name}"
                if key not in self._metrics:
                    self._metrics[key] = MeanWithStandardError().to(self.device)
                self._metrics[key].update(value)

    def _report(self, stage: str) -> None:
        averages = {
            key.removeprefix(f"{stage}/"): it for key, it in self._metrics.items() if key.startswith(f"{stage}/")
        }
        unit = None if self.data is None else self.data.bit_per_dim
        for name, value in summarized(averages, unit, errors=stage == "test").items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name in ("nll", "loss"))
        for metric in averages.values():
            metric.reset()

    def _stop_unless_finite(self, checked: list[tuple[str, int, Tensor]]) -> None:
        """Raise for the first of these (name, batch, value) that is not finite, in this process or another."""
        finite = torch.stack([torch.isfinite(value) for *_, value in checked]).all()
        if self.trainer.world_size > 1:  # all processes stop, or none
            finite = self.trainer.strategy.reduce((~finite).float(), reduce_op="sum") == 0
        if finite:
            return
        what, batch_idx, value = next((it for it in checked if not torch.isfinite(it[2])), checked[-1])
        # Lightning's own callback names two files, divflow's one.
        names = ("last_good", "last_model_path", "best_model_path")
        paths = [getattr(callback, name, "") for name in names for callback in self.trainer.checkpoint_callbacks]
        last = next((path for path in paths if path and Path(path).is_file()), None)
        raise TrainingError(
            f"the {what} is {value.item()} at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}): "
            + (
                f"the last good checkpoint is {last}; resume from it by ckpt_path={last}"
                if last
                else "no checkpoint yet"
            )
            + ". Lower the learning rate, clip gradients (trainer.gradient_clip_val=1.0), or look at that batch's data"
        )

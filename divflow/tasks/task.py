"""What all training tasks share: optimizer, judging by averages with standard errors, checkpoints, a stop at NaN."""

import math
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

from divflow.data.module import TensorDataModule
from divflow.data.order import combined_seed
from divflow.density import FlowDensity, UnnormalizedDensity
from divflow.errors import DivflowError
from divflow.tasks.metrics import MeanWithStandardError

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
    def check(self, batch: Tensor) -> None:
        """Before the first step: what is trained must be a field, and treat the samples independently."""

    @abstractmethod
    def loss(self, batch: Tensor) -> Tensor:
        """The loss of a training batch `(k, *event)`, a scalar, and its logs."""

    @abstractmethod
    def judge(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor | None]:
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

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Noise of the batch's own, whatever was drawn before: that of a run that never stopped.

        Raises:
            FieldError: at the first step, the field mixes the samples of a batch, or is none.
        """
        if not self._checked:
            self.check(batch)
            self._checked = True
        self._seed(_TRAINING, self.current_epoch, batch_idx)

    def on_validation_batch_start(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise at each validation."""
        self._seed(_JUDGING, batch_idx)

    def on_test_batch_start(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise as in validation."""
        self._seed(_JUDGING, batch_idx)

    def _seed(self, *numbers: int) -> None:
        seed = torch.initial_seed() if self._noise_seed is None else self._noise_seed
        torch.manual_seed(combined_seed(seed, self.global_rank, *numbers))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
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

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch to the validation averages."""
        self._average("val", self.judge(batch, batch_idx))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
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

    def bits_per_dim(self, nll: Tensor) -> Tensor | None:
        """Bits per dimension of the discrete data, from nats of the dequantized ones; None for continuous data."""
        data = self.data
        if data is None or data.levels is None:
            return None
        return nll / (math.prod(data.event_shape) * math.log(2)) + math.log2(data.levels)

    def judge_likelihood(self, density: FlowDensity, batch: Tensor) -> dict[str, Tensor | None]:
        """What a batch's log-density gives `judge`: nll, gap, evaluations and errors."""
        result = density.evaluate(batch)
        data = self.data
        truth = None if data is None else data.log_prob(batch)
        nll, errors = -result.log_prob, result.standard_error
        return {
            "nll": nll,
            "gap": None if truth is None else truth - result.log_prob,
            "nfe": torch.full_like(nll, result.evaluations.forward),
            "nfe_divergence": torch.full_like(nll, result.evaluations.divergence),
            "quadrature_error": result.quadrature_error,
            "estimator_variance": None if errors is None else errors.square(),
        }

    def _average(self, stage: str, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            if value is not None:
                key = f"{stage}/{name}"
                if key not in self._metrics:
                    self._metrics[key] = MeanWithStandardError().to(self.device)
                self._metrics[key].update(value)

    def _report(self, stage: str) -> None:
        for key, metric in self._metrics.items():
            if not key.startswith(f"{stage}/"):
                continue
            mean, error = metric.compute()
            name = key.removeprefix(f"{stage}/")
            if name == "estimator_variance":
                self.log(f"{stage}/estimator_error", mean.sqrt())
                if stage == "test":
                    self._log_error("nll_estimator_error", (mean / metric.count).sqrt().to(mean))
            else:
                self.log(key, mean, prog_bar=key in ("val/nll", "val/loss"))
                if name == "nll" and (bits := self.bits_per_dim(mean)) is not None:
                    self.log(f"{stage}/bits_per_dim", bits)
                if stage == "test" and not name.startswith("nfe") and name != "quadrature_error":
                    self._log_error(f"{name}_standard_error", error)
            metric.reset()

    def _log_error(self, name: str, error: Tensor) -> None:
        self.log(f"test/{name}", error)
        bits, zero = self.bits_per_dim(error), self.bits_per_dim(torch.zeros_like(error))
        if name.startswith("nll") and bits is not None and zero is not None:
            self.log(f"test/{name.replace('nll', 'bits_per_dim')}", bits - zero)

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

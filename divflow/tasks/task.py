"""Base of all training tasks: noise of each batch, averages with standard errors, and a stop at NaN."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.batch import Batch, Keys, Parts, check_keys, parts_of
from divflow.data.module import TensorDataModule
from divflow.data.order import combined_seed
from divflow.flow import FlowDensity
from divflow.score import UnnormalizedDensity
from divflow.tasks.errors import TaskError, TrainingError
from divflow.tasks.likelihood_values import likelihood_values
from divflow.tasks.metrics import MeanWithStandardError, summarized, warn_of_quadrature
from divflow.tasks.resuming import check_resumed, trained_by
from divflow.tasks.trainable import Trainable

__all__ = ["Task", "mean"]

# Purposes of noise.
_TRAINING, _EVALUATION = 0, 1
# Earlier names of methods of subclasses, and their present ones.
_RENAMED = {"judge": "evaluate_batch", "judged": "evaluated_density", "check_judged": "check_evaluation"}
# Settings that reduce the quadrature error of a test.
_FINER = "a smaller evaluation.likelihood.tolerance, evaluation.solver.rtol and .atol, or smaller steps of a fixed-step solver"


class Task(Trainable):
    """Base of tasks: a density with its loss, and what validation and test evaluate.

    A subclass implements `loss`, `check`, `evaluate_batch` and `evaluated_density`.

    **Batches** are `x`, `(x,)`, `(x, context)`, or dicts with x, context and weight, by these names or by `keys` (`parts_of`).

    **Weights** w_i of the samples make the loss of a batch the weighted mean of its samples' losses l_i,

        sum_i w_i l_i / sum_i w_i

    - Only ratios of weights matter, as for importance or survey weights, so the learning rate need not know their size.
    - In several processes the sum of weights runs over all samples of a step; over accumulated batches the weighted means of the
      batches are averaged.
    - If the sums of batches differ much, the weighted mean has a bias of about 1 / k for k samples, so avoid small batches.
    - Validation and test average all samples by weight, with the standard error of a weighted mean.

    Args:
        density: module that is trained and saved.
        optimizer: function of the parameters that returns the optimizer.
        scheduler: function of the optimizer that returns a learning rate schedule; None for none. It steps after every
            optimizer step; a `ReduceLROnPlateau` steps after every validation.
        config: plain dict that is saved in each checkpoint. `divflow.load` rebuilds the density from it, and
            `load_from_checkpoint` the task, if it has `task`, as `build_task` takes it.
        monitor: name of the validation value that `ReduceLROnPlateau` follows; if None `val/nll`, or `val/loss` for a score without SDE.
        keys: where the parts of a batch are, if not at their usual places or names.

    Attributes:
        lr: learning rate that replaces the optimizer's own for all its parameters; None to keep that. `Tuner.lr_find` sets it.
    """

    def __init__(
        self,
        density: nn.Module,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        config: dict[str, Any] | None,
        monitor: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(density, optimizer, scheduler, config, monitor)
        check_keys(keys)
        self.keys = keys
        self._checked = False
        self._noise_seed: int | None = None
        # Numbers and losses of the batches since the last optimizer step.
        self._losses: list[tuple[int, Tensor]] = []
        # By stage, loader and name.
        self._metrics: dict[tuple[str, str, str], MeanWithStandardError] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class that defines a method under its earlier name, which is no longer called.

        Raises:
            TaskError: naming the method and its present name.
        """
        super().__init_subclass__(**options)
        for before, now in _RENAMED.items():
            if before in vars(cls):
                raise TaskError(f"{cls.__name__} defines {before}, which is called {now} now. Rename it")

    @property
    @abstractmethod
    def evaluated_density(self) -> FlowDensity | UnnormalizedDensity:
        """Density that validation and test evaluate."""

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Check before the first step that what is trained is a field that treats samples independently.

        Raises:
            FieldError: it is not.
        """

    def check_evaluation(self, batch: Batch) -> None:
        """Check the evaluated density in evaluation mode, where it may hide derivatives that it shows in training."""
        self.check(batch)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Loss of a training batch, a scalar; logs what belongs to it."""

    @abstractmethod
    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """Evaluate a batch of validation or test.

        Args:
            batch: the batch.
            batch_idx: a number that is unique over all loaders, to seed the noise of the batch.

        Returns:
            Values per sample by name, which `Task` averages; None is left out.
        """

    def parts(self, batch: Batch) -> Parts:
        """Data, context and weights of a batch.

        Raises:
            DataError, FieldError: as `parts_of`.
        """
        return parts_of(batch, self.keys)

    def shares(self, weight: Tensor | None) -> Tensor | None:
        """Shares `(k,)` of the samples in the mean of a batch: w_i over the sum of all weights; None without weights.

        In several processes the sum is the mean of the processes' sums.
        """
        if weight is None:
            return None
        total = weight.sum(dtype=torch.float64)
        if self._trainer is not None and self._trainer.world_size > 1:
            total = self._trainer.strategy.reduce(total, reduce_op="mean")
        return weight / total

    @property
    def data(self) -> TensorDataModule | None:
        """The data module, if it is one of divflow's."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TensorDataModule) else None

    def setup(self, stage: str) -> None:
        """Fix the seed of all noise for all processes; it must be kept, since each batch seeds torch anew."""
        super().setup(stage)
        if self._noise_seed is None:
            self._noise_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Check the field at the first step, and seed the noise of the batch as a run that was never interrupted would.

        Raises:
            FieldError: at the first step, the field mixes the samples of a batch, or is none.
        """
        if not self._checked:
            self.check(batch)
            with self.evaluating():
                self.check_evaluation(batch)
            self._checked = True
        self._seed(_TRAINING, self.current_epoch, batch_idx)

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Seed the noise of the batch, the same at each validation."""
        self._seed(_EVALUATION, _number(batch_idx, dataloader_idx))

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Seed the noise of the batch, as in validation."""
        self._seed(_EVALUATION, _number(batch_idx, dataloader_idx))

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Seed the noise of the batch, as in validation."""
        self._seed(_EVALUATION, _number(batch_idx, dataloader_idx))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put all modules in evaluation mode within this context, and restore each afterwards."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _seed(self, *numbers: int) -> None:
        assert self._noise_seed is not None  # `setup` has set it
        torch.manual_seed(combined_seed(self._noise_seed, self.global_rank, *numbers))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.loss(batch)
        self._losses.append((batch_idx, loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop at losses and gradients that are not finite, so that saved checkpoints have finite weights.

        Losses and gradient are checked together, because each check makes the host wait for the device.

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

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the validation averages, separately for each loader."""
        self._average("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the test averages, separately for each loader."""
        self._average("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Log-density of each sample of a batch, `(k,)` in nats per unit of the data, as validation evaluates it.

        Raises:
            TaskError: the task trains a score without SDE, which has no log-density.
        """
        density = self.evaluated_density
        if isinstance(density, UnnormalizedDensity):
            raise TaskError(
                "trainer.predict returns log-densities, but a score without SDE has none. Use task.density.score(x), or train over an SDE"
            )
        nll = self.likelihood_values(density, batch)["nll"]
        assert nll is not None  # the one value that is always known
        return -nll

    def on_validation_epoch_end(self) -> None:
        """Log the validation averages, and step the schedules that follow them before a checkpoint is saved."""
        found = self._report("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.follow(found)

    def on_test_epoch_end(self) -> None:
        """Log the test averages and their standard errors."""
        self._report("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seed of the noise, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["noise_seed"] = self._noise_seed
        if optimizers := self.trainer.optimizers:
            checkpoint["trained_by"] = trained_by(self, optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the noise of the saved run; a task that is loaded without a trainer begins a run of its own.

        Raises:
            ResumeError: training is to resume from another task, optimizer or objective, or without its average of the weights.
        """
        super().on_load_checkpoint(checkpoint)
        trainer: Any = self._trainer
        if trainer is None:
            return
        self._noise_seed = checkpoint.get("noise_seed", self._noise_seed)
        if trainer.state.fn == TrainerFn.FITTING:
            check_resumed(self, trainer.callbacks, checkpoint)

    def count(self, number: int) -> Tensor:
        """Make a tensor to log of a number, on the device. Lightning would copy it there, and the host would wait."""
        return torch.full((), float(number), device=self.device)

    def likelihood_values(self, density: FlowDensity, batch: Batch) -> dict[str, Tensor | None]:
        """Values of `evaluate_batch` from a batch's log-density; in the test over the data module's number of noise draws."""
        data = self.data
        draws = data.num_draws if data is not None and self.trainer.testing else 1
        return likelihood_values(density, self.parts(batch), data, draws)

    def _average(self, stage: str, batch: Batch, batch_idx: int, dataloader_idx: int | None) -> None:
        # As Lightning names values of several loaders.
        loader = "" if dataloader_idx is None else f"/dataloader_idx_{dataloader_idx}"
        parts = self.parts(batch)
        for name, value in self.evaluate_batch(parts, _number(batch_idx, dataloader_idx)).items():
            if value is not None:
                key = (stage, loader, name)
                if key not in self._metrics:
                    self._metrics[key] = MeanWithStandardError().to(self.device)
                self._metrics[key].update(value, parts.weight)

    def _report(self, stage: str) -> dict[str, Tensor]:
        """Log the averages of each loader, and return them by the names under which they are logged."""
        logged: dict[str, Tensor] = {}
        # Without values that only an earlier validation averaged, such as those of other loaders.
        metrics = {key: metric for key, metric in self._metrics.items() if key[0] == stage and metric.update_called}
        unit = None if self.data is None else self.data.bit_per_dim
        for loader in dict.fromkeys(loader for _, loader, _ in metrics):
            averages = {name: metric for (_, of, name), metric in metrics.items() if of == loader}
            found = summarized(averages, unit, errors=stage == "test")
            if stage == "test" and self.trainer.is_global_zero:
                warn_of_quadrature(found, _FINER)
            for name, value in found.items():
                shown = stage == "val" and name in ("nll", "loss")
                self.log(f"{stage}/{name}{loader}", value, prog_bar=shown, add_dataloader_idx=False)
                logged[f"{stage}/{name}{loader}"] = value
        for metric in metrics.values():
            metric.reset()
        return logged

    def _stop_unless_finite(self, checked: list[tuple[str, int, Tensor]]) -> None:
        """Raise for the first of these (name, batch, value) that is not finite, in this process or another."""
        finite = torch.stack([torch.isfinite(value) for *_, value in checked]).all()
        if self.trainer.world_size > 1:  # all processes stop, or none
            finite = self.trainer.strategy.reduce((~finite).float(), reduce_op="sum") == 0
        if finite:
            return
        what, batch_idx, value = next((it for it in checked if not torch.isfinite(it[2])), checked[-1])
        # Attributes of Lightning's own callback, and of divflow's.
        names = ("last_good", "last_model_path", "best_model_path")
        paths = [getattr(callback, name, "") for name in names for callback in self.trainer.checkpoint_callbacks]
        last = next((path for path in paths if path and Path(path).is_file()), None)
        raise TrainingError(
            f"the {what} is {value.item()} at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}): "
            + (
                f"the last good checkpoint is {last}. Resume from it by ckpt_path={last}"
                if last
                else "no checkpoint yet"
            )
            + ". Lower the learning rate, clip gradients (trainer.gradient_clip_val=1.0), or look at that batch's data"
        )


def _number(batch_idx: int, dataloader_idx: int | None) -> int:
    """Number of a batch among those of all loaders, below 2^32, since it may seed torch."""
    return batch_idx + ((dataloader_idx or 0) << 20)


def mean(values: Tensor, shares: Tensor | None) -> Tensor:
    """Mean of values `(k,)`, weighted by their shares if there are any."""
    return values.mean() if shares is None else (shares.to(values) * values).sum()

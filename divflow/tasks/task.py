"""What all training tasks share: noise of each batch, averages with standard errors, a stop at NaN."""

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

# What noise is for.
_TRAINING, _EVALUATION = 0, 1
# Names that subclasses defined before, and those of today.
_RENAMED = {"judge": "evaluate_batch", "judged": "evaluated_density", "check_judged": "check_evaluation"}
# What makes the quadrature error of a test smaller.
_FINER = "a smaller evaluation.likelihood.tolerance, evaluation.solver.rtol and .atol, or smaller steps of a fixed-step solver"


class Task(Trainable):
    """A density that is trained. A subclass implements `loss`, `check` and `evaluate_batch`, and is told what to log.

    **Batches** are `x`, `(x,)`, `(x, context)`, or dicts with x, context and weight, by these names or by `keys` (`parts_of`).

    **Weights** w_i of the samples make the loss of a batch the weighted mean of its samples' losses l_i,

        sum_i w_i l_i / sum_i w_i

    so that only their ratios count, as of weights of importance or of a survey, and the learning rate need not know their size. In
    several processes the sum of weights is that of all of a step's samples, whichever process has them; over accumulated batches
    it is the mean of the batches' weighted means. Such a mean is not free of bias where the weights of batches differ much in
    sum: of k samples by about 1 / k, so take batches that are not small. Validation and test average all samples by
    weight, with the standard error of a weighted mean.

    Args:
        density: what is trained and saved, a module.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, stepped after every step of the optimizer, or, if it
            is a `ReduceLROnPlateau`, after every validation; None for none.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density, and `load_from_checkpoint` the
            task, if it has `task`, as `build_task` takes it.
        monitor: the validation's value that `ReduceLROnPlateau` follows; `val/nll`, or `val/loss` of a score without SDE, if None.
        keys: where the parts of a batch are, where they are not by their places or names.

    Attributes:
        lr: a learning rate in the place of the optimizer's own, for all its parameters; None for that. `Tuner.lr_find` sets it.
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
        # Of the batches since the last optimizer step: number and loss.
        self._losses: list[tuple[int, Tensor]] = []
        # By stage, loader and name.
        self._metrics: dict[tuple[str, str, str], MeanWithStandardError] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class that still defines a method under its earlier name, which nothing calls any more.

        Raises:
            TaskError: naming it, and its name of today.
        """
        super().__init_subclass__(**options)
        for before, now in _RENAMED.items():
            if before in vars(cls):
                raise TaskError(f"{cls.__name__} defines {before}, which is called {now} now. Rename it")

    @property
    @abstractmethod
    def evaluated_density(self) -> FlowDensity | UnnormalizedDensity:
        """The density as validation and test evaluate it."""

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Before the first step: what is trained must be a field, and treat the samples independently."""

    def check_evaluation(self, batch: Batch) -> None:
        """Check the evaluated density before the first step, in evaluation mode, where it may hide a derivative that it does not hide in training."""
        self.check(batch)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of a training batch, a scalar, and its logs."""

    @abstractmethod
    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """Values per sample of a validation or test batch, by name, to be averaged; None is left out.

        Args:
            batch: of validation or test.
            batch_idx: its number, another for each batch of each loader, for noise of its own.
        """

    def parts(self, batch: Batch) -> Parts:
        """The data of a batch, their context and their weights.

        Raises:
            DataError, FieldError: as `parts_of`.
        """
        return parts_of(batch, self.keys)

    def shares(self, weight: Tensor | None) -> Tensor | None:
        """Of samples in the mean of a batch, w_i over the sum of all, `(k,)`: the mean over processes of their sums, if there are several."""
        if weight is None:
            return None
        total = weight.sum(dtype=torch.float64)
        if self._trainer is not None and self._trainer.world_size > 1:
            total = self._trainer.strategy.reduce(total, reduce_op="mean")
        return weight / total

    @property
    def data(self) -> TensorDataModule | None:
        """The data module, where it is one of divflow's."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TensorDataModule) else None

    def setup(self, stage: str) -> None:
        """Fix what all noise comes from, for all processes: each batch seeds torch anew, which forgets it."""
        super().setup(stage)
        if self._noise_seed is None:
            self._noise_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Noise of the batch's own, whatever was drawn before: that of a run that never stopped.

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
        """The same noise at each validation."""
        self._seed(_EVALUATION, _number(batch_idx, dataloader_idx))

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise as in validation."""
        self._seed(_EVALUATION, _number(batch_idx, dataloader_idx))

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise as in validation."""
        self._seed(_EVALUATION, _number(batch_idx, dataloader_idx))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it all modules are in evaluation mode; after it, each as it was."""
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

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the validation averages, which are those of its loader, where there are several."""
        self._average("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Add a batch to the test averages, which are those of its loader, where there are several."""
        self._average("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The log-density of each sample of a batch, `(k,)` in nats, of the data as they are, as validation evaluates it.

        Raises:
            TaskError: a score without SDE has none.
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
        """Log the validation averages; schedules follow them, before a checkpoint is saved."""
        found = self._report("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.follow(found)

    def on_test_epoch_end(self) -> None:
        """Log the test averages and their standard errors."""
        self._report("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the run's noise comes from, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["noise_seed"] = self._noise_seed
        if optimizers := self.trainer.optimizers:
            checkpoint["trained_by"] = trained_by(self, optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the noise of the run that was saved; what is loaded without a trainer begins a run of its own.

        Raises:
            ResumeError: training is to go on from another task's, optimizer's or objective's, or without its average of the weights.
        """
        super().on_load_checkpoint(checkpoint)
        trainer: Any = self._trainer
        if trainer is None:
            return
        self._noise_seed = checkpoint.get("noise_seed", self._noise_seed)
        if trainer.state.fn == TrainerFn.FITTING:
            check_resumed(self, trainer.callbacks, checkpoint)

    def count(self, number: int) -> Tensor:
        """A number to log, filled in on the device: Lightning would copy it there, for which the host waits."""
        return torch.full((), float(number), device=self.device)

    def likelihood_values(self, density: FlowDensity, batch: Batch) -> dict[str, Tensor | None]:
        """What a batch's log-density gives `evaluate_batch`; in the test, of as many draws of noise as the data say."""
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
        # What was averaged in an earlier validation alone, such as of other loaders, has nothing to say.
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
        # Lightning's own callback names two files, divflow's one.
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
    """Of a batch among those of all loaders; in the first one its number there. It may seed torch, which takes 32 bits of a seed."""
    return batch_idx + ((dataloader_idx or 0) << 20)


def mean(values: Tensor, shares: Tensor | None) -> Tensor:
    """The mean of values `(k,)`, by their shares if they have any."""
    return values.mean() if shares is None else (shares.to(values) * values).sum()

"""Base of tasks without their mathematics: optimizer, learning rate schedule, and complete checkpoints."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from divflow.score import UnnormalizedDensity
from divflow.tasks.errors import TaskError
from divflow.tasks.optimizer_modes import OptimizerModes
from divflow.tasks.schedules import check_schedules, follow_validation, stepping

__all__ = ["Trainable"]

_HALF = ("bf16-true", "16-true")


class Trainable(L.LightningModule):
    """Base of tasks: a density with the optimizer and the schedule that train it.

    Args:
        density: module that is trained and saved.
        optimizer: function of the parameters that returns the optimizer.
        scheduler: function of the optimizer that returns a learning rate schedule; None for none. It steps after every
            optimizer step; a `ReduceLROnPlateau` steps after every validation.
        config: plain dict that is saved in each checkpoint. `divflow.load` rebuilds the density from it, and
            `load_from_checkpoint` the task, if it has `task`, as `build_task` takes it.
        monitor: name of the validation value that `ReduceLROnPlateau` follows; if None `val/nll`, or `val/loss` for a score without SDE.

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
    ) -> None:
        super().__init__()
        self.density = density
        self.lr: float | None = None
        self._optimizer, self._scheduler, self._config, self._monitor = optimizer, scheduler, config, monitor
        self._modes, self._goes_on = OptimizerModes(), False

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805  a class method, which may not be called on an instance
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        allow: Iterable[type | str] = (),
        weights: str = "averaged",
        **arguments: Any,
    ) -> "Trainable":
        """Load a task with its trained weights, from a checkpoint of the command or of your own trainer.

        Checkpoints of the command describe the whole task. Others hold only weights: give the flow or score as it was built for
        training, `FlowTask.load_from_checkpoint(path, flow=flow)`. What else is not given, such as the optimizer, is the default of
        the class.

        Args:
            checkpoint_path: of the checkpoint.
            map_location: device of the task; the CPU if None.
            hparams_file: as Lightning takes it, for classes with hyperparameters of their own.
            strict: whether the names of all weights must match; True if None.
            weights_only: False lets Lightning read the file, which may run code in it.
            allow: further classes that may be built, such as your own network.
            weights: "averaged" (where training averaged them) or "current".
            arguments: arguments of the class, which override those of the checkpoint.

        Returns:
            The task, with the weights of the checkpoint.

        Raises:
            TaskError: the checkpoint does not describe what the task needs, or is of another task.
            CheckpointError: there is no such file, it names a class that is not allowed, or is of another architecture.
        """
        from divflow.saved.checkpoint import read_checkpoint
        from divflow.tasks.building import restore_task

        if isinstance(checkpoint_path, str | Path) and hparams_file is None and weights_only is not False:
            checkpoint = read_checkpoint(checkpoint_path, map_location or "cpu", weights)
            if "hyper_parameters" not in checkpoint:
                task = restore_task(cls, checkpoint, checkpoint_path, allow, strict, arguments)
                return task if map_location is None else task.to(map_location)
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only, **arguments
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Trainable":
        """Copy the task, as averages of the weights do; tensors that modules compute from parameters are copied as values.

        torch can't copy a tensor with a graph, such as the `weight` of `weight_norm` or of a pruned layer, which each evaluation
        computes anew.
        """
        for module in self.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        """The optimizer and its schedule."""
        optimizer = self._optimizer(self.parameters())
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self._scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": stepping(self._scheduler(optimizer))}

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any) -> None:
        """Step a schedule after an optimizer step; those that follow a value step after validations."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def setup(self, stage: str) -> None:
        """Begin with the weights of the module, unless a checkpoint that is read later holds others.

        Raises:
            TaskError: the precision keeps weights in half precision.
        """
        if self.trainer.precision in _HALF:
            raise TaskError(
                f"precision={self.trainer.precision!r} keeps weights and states in half precision, which is too coarse for trajectories and divergences. "
                "Use precision='bf16-mixed', which only evaluates networks in half precision"
            )
        if stage == "fit":
            self._modes = OptimizerModes()

    def on_train_start(self) -> None:
        """Check the schedules, and switch to the weights of training.

        Raises:
            TaskError: see `check_schedules`.
        """
        check_schedules(self.trainer)
        self._modes.train(self, self.trainer.optimizers)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Hold the weights to evaluate within this context, as in validation."""
        training = self._modes.training
        self._modes.eval(self, self.trainer.optimizers)
        try:
            yield
        finally:
            if training:
                self._modes.train(self, self.trainer.optimizers)

    def on_validation_start(self) -> None:
        """Switch to the weights to evaluate, which are validated and saved as the best."""
        self._goes_on = self._modes.training
        self._modes.eval(self, self.trainer.optimizers)

    def on_validation_end(self) -> None:
        """Switch back to the weights of training."""
        if self._goes_on:
            self._modes.train(self, self.trainer.optimizers)

    def on_train_end(self) -> None:
        """Switch to the weights to evaluate."""
        self._modes.eval(self, self.trainer.optimizers)

    def follow(self, values: Mapping[str, Tensor]) -> None:
        """Step the schedules that follow a value, after a validation that logged these values.

        Raises:
            TaskError: the value is not among them.
        """
        default = "val/loss" if isinstance(self.density, UnnormalizedDensity) else "val/nll"
        follow_validation(self.trainer, self._monitor or default, values)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what `divflow.load` needs to rebuild the density, and `load_from_checkpoint` the task."""
        if self._config is not None:
            checkpoint["divflow"] = {name: it for name, it in self._config.items() if name != "task"}
            if "task" in self._config:
                checkpoint["divflow_task"] = self._config["task"]
        self._modes.save(checkpoint, self, self.trainer.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the weights of training, if the checkpoint holds others in their place."""
        self._modes.load(checkpoint)

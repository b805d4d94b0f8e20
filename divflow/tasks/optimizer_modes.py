"""Support for optimizers that train one set of weights and evaluate another, such as schedule-free ones."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["OptimizerModes"]


class OptimizerModes:
    """Switch a module between the weights that its optimizers train and those that they evaluate.

    It applies to optimizers with methods `train()` and `eval()`, which convert the weights (schedule-free ones: Defazio et al. 2024);
    for others it does nothing. Switching back restores the exact weights of training. The optimizer's own conversion rounds, so
    that a run would depend on how often it is validated and saved.

    Attributes:
        training: whether the module holds the weights of training.
    """

    def __init__(self) -> None:
        self.training = False
        # Weights of training, while the module holds others.
        self._kept: dict[str, Tensor] | None = None

    def train(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Restore the weights of training."""
        if self.training or not (switched := _switched(optimizers)):
            return
        for optimizer in switched:
            optimizer.train()
        if self._kept is not None:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(self._kept[name])
        self._kept, self.training = None, True

    def eval(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Replace the weights of training by those to evaluate."""
        if not self.training:
            return
        self._kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        for optimizer in _switched(optimizers):
            optimizer.eval()
        self.training = False

    def save(self, checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Save the weights to evaluate in a checkpoint, and beside them those of training."""
        training = self.training
        self.eval(module, optimizers)
        if self._kept is not None:
            # If a callback averages weights, the checkpoint holds the module's own beside them.
            place = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
            checkpoint[place] = {name: value.clone() for name, value in module.state_dict().items()}
            if "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            checkpoint["training_weights"] = self._kept
        if training:
            self.train(module, optimizers)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the weights of training from a checkpoint, to be restored when training begins."""
        self._kept, self.training = checkpoint.get("training_weights"), False


def _switched(optimizers: Sequence[Optimizer]) -> list[Any]:
    return [it for it in optimizers if all(callable(getattr(it, name, None)) for name in ("train", "eval"))]

"""Optimizers that train one set of weights and leave another to be evaluated, such as schedule-free ones."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["OptimizerModes"]


class OptimizerModes:
    """Which weights are in a module: those its optimizers train, or those they leave to be evaluated.

    It is of optimizers that have methods `train()` and `eval()`, which change the weights from one to the other (schedule-free ones:
    Defazio et al. 2024); with others it does nothing. Going back restores the very weights that training had: the optimizer's own way
    rounds, and a run would depend on how often it is validated and saved.

    Attributes:
        training: whether the weights are those of training.
    """

    def __init__(self) -> None:
        self.training = False
        # Those of training, while others are in the module.
        self._kept: dict[str, Tensor] | None = None

    def train(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Go on with the weights of training."""
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
        """Put the weights to evaluate in the place of those of training."""
        if not self.training:
            return
        self._kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        for optimizer in _switched(optimizers):
            optimizer.eval()
        self.training = False

    def save(self, checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Let a checkpoint hold the weights to evaluate, and beside them those from which training goes on."""
        training = self.training
        self.eval(module, optimizers)
        if self._kept is not None:
            # Where a callback averages weights, the module's own stand beside those.
            place = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
            checkpoint[place] = {name: value.clone() for name, value in module.state_dict().items()}
            if "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            checkpoint["training_weights"] = self._kept
        if training:
            self.train(module, optimizers)

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from the weights of training in a checkpoint, once training begins."""
        self._kept, self.training = checkpoint.get("training_weights"), False


def _switched(optimizers: Sequence[Optimizer]) -> list[Any]:
    return [it for it in optimizers if all(callable(getattr(it, name, None)) for name in ("train", "eval"))]

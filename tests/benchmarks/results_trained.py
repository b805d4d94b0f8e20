"""What rows measure: a trained density, ours or a peer's, and the data it was trained on."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor, nn

import divflow
from divflow.data.batch import parts_of
from divflow.data.module import TensorDataModule
from divflow.tasks.metrics import MeanWithStandardError


class Trained(ABC):
    """A density of data, given a context where they have one.

    Attributes:
        model: with its parameters.
        data: with the split.
    """

    def __init__(self, model: nn.Module, data: TensorDataModule) -> None:
        self.model, self.data = model, data

    @abstractmethod
    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """In nats, of data `(k, *event)` in their own units."""

    @abstractmethod
    def sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """Data in their own units; `context` has one row a sample."""


class Ours(Trained):
    """The density of a run's best checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(divflow.load(folder / "checkpoints" / "best.ckpt"), run_data(run_config(folder)))

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """By the run's evaluation."""
        return self.model.log_prob(x, context)

    def sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """By the run's solver."""
        return self.model.sample(num_samples, context, Generator().manual_seed(0))


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


def run_config(folder: Path) -> DictConfig:
    """The settings of a run."""
    return OmegaConf.load(folder / "config.yaml")


def run_data(config: DictConfig) -> TensorDataModule:
    """The data of a run."""
    return instantiate(config.data, _convert_="all")


def run_results(folder: Path) -> dict[str, Any]:
    """The `results.json` of a run."""
    return json.loads((folder / "results.json").read_text())


@torch.no_grad()
def tested(trained: Trained) -> dict[str, float]:
    """The mean of -log p over the test rows, bits per dimension of discrete data, and their standard errors over rows."""
    data, found = trained.data, {"nll": MeanWithStandardError(), "bits_per_dim": MeanWithStandardError()}
    for batch in data.test_dataloader():
        x, context, _ = parts_of(batch)
        log_prob = trained.log_prob(x, context)
        found["nll"].update(-log_prob)
        if (bits := data.bits_per_dim(log_prob, x)) is not None:
            found["bits_per_dim"].update(bits)
    metrics = {}
    for name, metric in found.items():
        if metric.count:
            mean, error, _ = metric.compute()
            metrics |= {name: mean.item(), f"{name}_standard_error": error.item()}
    return metrics

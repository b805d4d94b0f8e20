"""Figures of the density while it trains, and at the end."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from divflow.callbacks.averaging import WeightAverage
from divflow.callbacks.declared import declared
from divflow.data.module import TensorDataModule
from divflow.figures import plot_images, plot_marginals, plot_plane
from divflow.tasks.density import FlowDensity
from divflow.tasks.task import Task

__all__ = ["Figures"]


class Figures(L.Callback):
    """Write `figures/epoch_0010.png`, ... every N epochs, and `figures/final.png` after the test.

    In the plane: data, samples, log-density, score and trajectories, as far as they are known. For images a grid of samples, for other data the
    histograms of the columns. Always of the averaged weights, where there are such. The last figure's samples are left in
    `samples.npy`, too, in the units of the data.

    Args:
        every_n_epochs: 0 for none but the last.
        num_samples: drawn for a figure; images are 64.
        dpi: dots per inch.
    """

    def __init__(self, every_n_epochs: int = 10, num_samples: int = 4_000, dpi: int = 150) -> None:
        self.every_n_epochs, self.num_samples, self.dpi = every_n_epochs, num_samples, dpi

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One more figure, if it is time."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0 and trainer.is_global_zero:
            average = next((c for c in declared(trainer).callbacks if isinstance(c, WeightAverage)), None)
            with average.averaged(pl_module) if average else contextlib.nullcontext():
                self._save(trainer, cast(Task, pl_module), f"epoch_{epoch:04d}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last figure, of the weights that were tested."""
        if trainer.is_global_zero:
            self._save(trainer, cast(Task, pl_module), "final")

    def _save(self, trainer: L.Trainer, task: Task, name: str) -> None:
        data = task.data
        if data is None or declared(trainer).fast_dev_run:
            return
        training = task.training
        task.eval()
        count = 64 if data.images else self.num_samples
        samples = task.judged.sample(count, generator=Generator(task.device).manual_seed(0))
        figure = self._draw(task, data, samples)
        task.train(training)
        root = Path(trainer.default_root_dir)
        (root / "figures").mkdir(parents=True, exist_ok=True)
        figure.savefig(root / "figures" / f"{name}.png", dpi=self.dpi)
        if name == "final":
            np.save(root / "samples.npy", samples.cpu().numpy())

    @torch.no_grad()
    def _draw(self, task: Task, data: TensorDataModule, samples: Tensor) -> Figure:
        density = task.judged
        rows: Tensor = data.test.rows[: len(samples)].to(task.device)
        if data.images:
            return plot_images(rows, samples)
        if data.event_shape == (2,):
            score = getattr(density, "score", None)
            if isinstance(density, FlowDensity):
                return plot_plane(rows, samples, density.log_prob, score, _paths(density))
            # A score without SDE has no density; where the truth is known, the score is drawn over that.
            truth = cast(Callable[[Tensor], Tensor], data.log_prob) if data.log_prob(rows[:1]) is not None else None
            return plot_plane(rows, samples, truth, score, name="True log-density")
        return plot_marginals(
            rows, samples, getattr(data, "columns", [f"$x_{{{i + 1}}}$" for i in range(rows.shape[1])])
        )


def _paths(density: FlowDensity, count: int = 60) -> Tensor:
    """Trajectories of the density's flow from base to data, `(times, count, 2)`, in the data's units."""
    flow = density.flow
    z = flow.base.sample(count, Generator(next(density.parameters()).device).manual_seed(0))
    states = flow.trajectory(z, torch.linspace(*flow.times(), 40).tolist())
    return torch.stack([density.transform.inverse(state) for state in states])

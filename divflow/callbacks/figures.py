"""Figures of the density in training and at its end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Generator, Tensor

from divflow.callbacks.manifold_plots import plot_on_manifold
from divflow.callbacks.plots import plot_curves, plot_energies, plot_images, plot_pairs, plot_plane
from divflow.callbacks.trainer_attributes import declared
from divflow.callbacks.weight_average import WeightAverage
from divflow.data.batch import parts_of
from divflow.data.module import TensorDataModule
from divflow.flow import FlowDensity
from divflow.score import UnnormalizedDensity
from divflow.tasks.task import Task

__all__ = ["Figures", "log_figure"]


class Figures(L.Callback):
    """Draw figures of the density in training and after the test, and the learning curve.

    | data | figure |
    |---|---|
    | in the plane | data, samples, log-density, score and trajectories, as far as they are known |
    | images | a grid of samples |
    | particles of known energy | histograms of the energy and of distances, also of weighted samples |
    | places, angles, rotations | a world map, the square of two angles, or the axes of rotations, with data, samples and the log-density |
    | other | histograms, and pairs of columns |

    - Samples of a conditional density are drawn given contexts of the data.
    - Figures show the averaged weights, if training averages them.
    - The samples of the last figure are saved in `samples.npy`, in the units of the data, or the coordinates of their file.
    - The learning curve is drawn from `metrics.csv`.
    - In training, a figure is skipped if it would exceed its share of the time. The first is drawn when training has lasted long
      enough for a figure that takes a second.

    Args:
        every_n_steps: steps of the optimizer between figures; 0 for the last figure alone.
        share: share of the training time that figures may take.
        num_samples: samples in a figure; 64 for images.
        dpi: dots per inch.
    """

    def __init__(self, every_n_steps: int = 100, share: float = 0.03, num_samples: int = 4_000, dpi: int = 150) -> None:
        self.every_n_steps, self.share, self.num_samples, self.dpi = every_n_steps, share, num_samples, dpi
        self._began, self._spent, self._last = 0.0, 0.0, 1.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Draw a figure, if one is due and there is time for it."""
        step = trainer.global_step
        stepped = step and not trainer.fit_loop.epoch_loop._should_accumulate()
        if not (stepped and self.every_n_steps and step % self.every_n_steps == 0 and trainer.is_global_zero):
            return
        now = time.monotonic()
        if self._spent + self._last > self.share * (now - self._began):
            return
        average = next((c for c in declared(trainer).callbacks if isinstance(c, WeightAverage)), None)
        task = cast(Task, pl_module)
        with average.averaged(task) if average else task.evaluated():
            self._save(trainer, task, f"step_{step:06d}")
        self._last = time.monotonic() - now
        self._spent += self._last

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last figure, of the weights that were tested, and the learning curve."""
        if trainer.is_global_zero:
            self._save(trainer, cast(Task, pl_module), "final")
            self._save_curve(trainer)

    def _save(self, trainer: L.Trainer, task: Task, name: str) -> None:
        data = task.data
        if data is None or declared(trainer).fast_dev_run:
            return
        training = task.training
        task.eval()
        count, context = 64 if data.images else self.num_samples, None
        if data.context_features:
            context = parts_of(data.test.__getitems__(list(range(min(count, len(data.test)))))).context
        generator = Generator(task.device).manual_seed(0)
        if context is None:
            samples = task.evaluated_density.sample(count, generator=generator)
        else:  # a sample for the context of each datum
            samples = cast(FlowDensity, task.evaluated_density).sample(len(context), context.to(task.device), generator)
        figure = self._draw(task, data, samples)
        task.train(training)
        self._write(trainer, figure, name)
        if name == "final":
            written = samples if data.coordinates is None else data.coordinates.rows(samples)
            np.save(Path(trainer.default_root_dir) / "samples.npy", written.cpu().numpy())

    def _write(self, trainer: L.Trainer, figure: Figure, name: str) -> None:
        path = Path(trainer.default_root_dir) / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=self.dpi)
        log_figure(trainer, name.partition("_")[0], figure, path)

    def _save_curve(self, trainer: L.Trainer) -> None:
        table = Path(trainer.default_root_dir) / "metrics.csv"
        if table.is_file() and (figure := plot_curves({"": table})) is not None:
            self._write(trainer, figure, "curve")

    @torch.no_grad()
    def _draw(self, task: Task, data: TensorDataModule, samples: Tensor) -> Figure:
        density = task.evaluated_density
        rows: Tensor = data.test.rows[: len(samples)].to(task.device)
        if data.images:
            return plot_images(rows, samples)
        log_prob, name = (None, "") if data.context_features else _log_density(density, data, rows)
        if data.manifold is not None:
            return plot_on_manifold(data.manifold, rows, samples, log_prob, getattr(data, "columns", None), name)
        if data.event_shape == (2,) and not data.context_features:
            paths = _paths(density) if isinstance(density, FlowDensity) else None
            return plot_plane(rows, samples, log_prob, getattr(density, "score", None), paths, name)
        if data.energy is not None and isinstance(density, FlowDensity):
            return plot_energies(rows, samples, _log_weights(density, data, samples), data.energy)
        rows, samples = rows.flatten(1), samples.flatten(1)
        names = getattr(data, "columns", None) or [f"$x_{{{i + 1}}}$" for i in range(rows.shape[1])]
        return plot_pairs(rows, samples, names)


def _log_density(
    density: FlowDensity | UnnormalizedDensity, data: TensorDataModule, rows: Tensor
) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """The log-density to draw and its name. A score without SDE has none; that of the truth is drawn where it is known."""
    if isinstance(density, FlowDensity):
        return density.log_prob, "Log-density"
    known = data.log_prob(rows[:1]) is not None
    return (cast(Callable[[Tensor], Tensor], data.log_prob) if known else None), "True log-density"


def _log_weights(density: FlowDensity, data: TensorDataModule, samples: Tensor) -> Tensor | None:
    """Log-weights `(n,)` of samples towards the density of the data's energy; None for an estimated divergence."""
    if data.energy is None or density.flow.estimator.estimates:
        return None
    log_prob = torch.cat([density.log_prob(part) for part in samples.split(data.eval_batch_size)])
    return -data.energy(samples.clone()) - log_prob


def _paths(density: FlowDensity, count: int = 60) -> Tensor:
    """Trajectories of the density's flow from base to data, `(times, count, 2)`, in the data's units."""
    flow = density.flow
    z = flow.sample_base(count, Generator(next(density.parameters()).device).manual_seed(0))
    states = flow.trajectory(z, torch.linspace(*flow.times(), 40, device="cpu").tolist())
    return torch.stack([density.transform.inverse(state) for state in states])


def log_figure(trainer: L.Trainer, name: str, figure: Figure, path: Path) -> None:
    """Pass a figure, which has been saved under a path, to the loggers that show figures."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), "figures")

"""Figures of densities (data in the plane, images, columns of tables, particles) and of their training."""

import csv
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from divflow.energies import PairEnergy

__all__ = ["plot_curves", "plot_energies", "plot_grid", "plot_images", "plot_pairs", "plot_plane"]

Field = Callable[[Tensor], Tensor]

_GRID = 120
_ARROWS = 22
_NATS_SHOWN = 10.0
_COLORS = "0.6", "C0"  # of data and of samples
_STAGES = "train", "val"
_CURVES = {"nll": "negative log-likelihood (nats)", "loss": "objective"}


@torch.no_grad()
def plot_plane(
    data: Tensor,
    samples: Tensor,
    log_prob: Field | None = None,
    score: Field | None = None,
    paths: Tensor | None = None,
    name: str = "Log-density",
) -> Figure:
    """Plot a density in the plane: data, samples, and what else is known of it.

    Args:
        data: `(n, 2)`.
        samples: `(n, 2)`.
        log_prob: function of points `(k, 2)` that returns log-densities `(k,)` in nats, drawn as an image.
        score: function of points `(k, 2)` that returns scores `(k, 2)`, drawn as arrows over the log-density or the data.
        paths: trajectories `(times, k, 2)` from the base to the data.
        name: name of the log-density, for the title.
    """
    low, high = _extent(data)
    density_drawn = log_prob is not None or score is not None
    count = 2 + density_drawn + (paths is not None)
    figure = Figure(figsize=(3.25 * count, 3.3), layout="constrained")
    axes = figure.subplots(1, count)
    for ax, points, title in zip(axes, (data, samples), ("Data", "Samples of the model"), strict=False):
        _scatter(ax, points)
        ax.set_title(title)
    if density_drawn:
        if log_prob is not None:
            _draw_log_density(axes[2], log_prob, data.device, low, high)
        else:
            _scatter(axes[2], data)
        if score is not None:
            _draw_score(axes[2], score, data, low, high)
        titles = ([name] if log_prob is not None else []) + (
            ["score" if log_prob is not None else "Score"] if score is not None else []
        )
        axes[2].set_title(" and ".join(titles))
    if paths is not None:
        _draw_paths(axes[-1], paths)
    for ax in axes[: 2 + density_drawn]:
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for ax in axes:
        ax.set(xlabel="$x_1$", aspect="equal")
    axes[0].set_ylabel("$x_2$")
    return figure


def plot_images(data: Tensor, samples: Tensor, rows: int = 8) -> Figure:
    """Plot a grid of images of the data beside one of samples.

    Args:
        data: grey images `(n, height * width)` (square) or `(n, channels, height, width)`, values in [0, 1].
        samples: images of the same form.
        rows: images on each side of a grid.
    """
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    for ax, images, title in zip(figure.subplots(1, 2), (data, samples), ("Data", "Samples of the model"), strict=True):
        ax.imshow(_tile(images[: rows**2], rows, rows), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title)
        ax.set_axis_off()
    return figure


def plot_grid(images: Tensor, dpi: int = 150) -> Figure:
    """Plot images on a grid with one place for each, or a few more; 0 is black.

    Args:
        images: as those of `plot_images`.
        dpi: dots per inch of the file. Each pixel of an image becomes a square of dots.
    """
    columns = math.ceil(math.sqrt(len(images)))
    tile = _tile(images, math.ceil(len(images) / columns), columns)
    height, width = tile.shape[:2]
    dots = max(1, 1_200 // max(height, width))
    figure = Figure(figsize=(width * dots / dpi, height * dots / dpi), dpi=dpi)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(tile, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_axis_off()
    return figure


def plot_pairs(data: Tensor, samples: Tensor, names: Sequence[str], columns: int = 6) -> Figure:
    """Plot the first columns of a table: their histograms and each pair of them, data below and samples above the diagonal.

    Args:
        data: `(n, D)`.
        samples: `(m, D)`.
        names: names of the columns.
        columns: how many are drawn; the title names those that are left out.
    """
    count = min(columns, data.shape[1])
    size = max(4.5, 1.9 * count)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes: Any = figure.subplots(count, count, squeeze=False, sharex="col")
    tables = [table[:, :count].float().cpu().numpy() for table in (data, samples)]
    ranges = [_range(tables[0][:, i]) for i in range(count)]
    for i, j in np.ndindex(count, count):
        ax = axes[i, j]
        if i == j:
            _draw_histograms(ax, tables[0][:, i], tables[1][:, i], ranges[i])
        else:
            points = tables[j > i][:, [j, i]]
            area = min(max(4_000 / len(points), 2.0), 12.0)
            ax.scatter(*points.T, s=area, color=_COLORS[j > i], alpha=0.5, linewidths=0, rasterized=True)
            ax.set_ylim(ranges[i])
        ax.set_xlim(ranges[j])
        ax.set_xlabel(names[j] if i == count - 1 else "")
        ax.set_ylabel(names[i] if j == 0 else "")
        ax.tick_params(labelsize="x-small", labelleft=j == 0 and i > 0)
    left_out = f"; not shown: {', '.join(names[count:])}" if len(names) > count else ""
    title = f"Data (grey, below) and samples of the model (blue, above){left_out}"
    figure.suptitle(textwrap.fill(title, int(size * 11)), fontsize="medium")
    return figure


@torch.no_grad()
def plot_energies(data: Tensor, samples: Tensor, log_weights: Tensor | None, energy: PairEnergy) -> Figure:
    """Plot energies and distances of pairs: histograms of the data, of samples and of weighted samples.

    Args:
        data: particles `(n, particles, dimensions)`.
        samples: `(m, particles, dimensions)`.
        log_weights: log-weights of the samples up to a constant, `(m,)`; None if they have none.
        energy: energy in kT.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    weights = None if log_weights is None else log_weights.double().softmax(dim=0)
    quantities = {"energy (kT)": lambda x: energy(x)[:, None], "distance of a pair": energy.distances}
    for ax, (name, quantity) in zip(figure.subplots(1, 2), quantities.items(), strict=True):
        of_data, of_samples = (quantity(x).double().cpu() for x in (data, samples))
        low, high = _range(of_data.flatten().numpy())
        edges = np.linspace(low, high + 0.25 * (high - low), 81)
        drawn: list[tuple[str, Tensor, Tensor | None, str]] = [
            ("data", of_data, None, "0.8"),
            ("samples", of_samples, None, "C0"),
        ]
        if weights is not None:
            drawn.append(("samples, weighted", of_samples, weights.cpu(), "C1"))
        for label, values, each, color in drawn:
            share = torch.full_like(values[:, 0], 1 / len(values)) if each is None else each
            share = (share[:, None] / values.shape[1]).expand_as(values).flatten()
            # Divided by all, so that what lies outside of the histogram is missing from it.
            heights = np.histogram(values.flatten().numpy(), edges, weights=share.numpy())[0] / np.diff(edges)
            ax.stairs(heights, edges, label=label, color=color, fill=label == "data")
        ax.set(xlabel=name, ylabel="density")
    axes = figure.axes
    axes[0].legend(frameon=False, fontsize="small")
    if weights is not None:
        axes[0].set_title(
            f"effective sample size {100 / len(weights) / float(weights.square().sum()):.1f} %", fontsize="medium"
        )
    return figure


def plot_curves(tables: Mapping[str, Path]) -> Figure | None:
    """Plot learning curves: training, and validation with its best step marked.

    Args:
        tables: path of the `metrics.csv` of each run, by the name to show; an empty name for a single run.

    Returns:
        The figure; None if nothing was logged.
    """
    runs = {name: _read_metrics(path) for name, path in tables.items()}
    shown = [key for key in _CURVES if any(f"{stage}/{key}" in run for run in runs.values() for stage in _STAGES)]
    if not shown:
        return None
    named = [name for name in runs if name]
    figure = Figure(figsize=(1 + 5 * len(shown), 3.6 + 0.2 * len(named)), layout="constrained")
    for key, ax in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for number, run in enumerate(runs.values()):
            _draw_curve(ax, run, key, f"C{number % 10}")
        ax.set(xlabel="step", ylabel=_CURVES[key])
        if not named and ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, fontsize="small")
    if named:  # long names go below the figure, not over its curves
        lines = [Line2D([], [], color=f"C{number % 10}", label=name) for number, name in enumerate(runs)]
        figure.legend(handles=lines, loc="outside lower left", frameon=False, fontsize="small")
    return figure


def _read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values by the name of a metric."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in rows[0] if rows else ():
        logged = [(float(row["step"]), float(row[name])) for row in rows if row[name] and row["step"]]
        if logged:
            steps, values = np.array(logged).T
            found[name] = steps + 1, values  # Lightning counts the steps before
    return found


def _draw_curve(ax: Axes, run: Mapping[str, tuple[np.ndarray, np.ndarray]], key: str, color: str) -> None:
    if f"train/{key}" in run:
        ax.plot(*run[f"train/{key}"], color=color, alpha=0.35, linewidth=0.8, label="training")
    if f"val/{key}" in run:
        steps, values = run[f"val/{key}"]
        ax.plot(steps, values, color=color, linewidth=1.5, label="validation")
        best = int(np.argmin(values))
        ax.plot(steps[best], values[best], "*", color=color, markersize=11, label=f"best, step {steps[best]:.0f}")
    # Curves that diverge for a while must not hide the others.
    series = [run[f"{stage}/{key}"][1] for stage in _STAGES if f"{stage}/{key}" in run]
    low, high = min(map(np.min, series), default=0.0), max((np.quantile(it, 0.95) for it in series), default=1.0)
    if not ax.get_autoscaley_on():  # set by a run before
        low, high = min(low, ax.dataLim.y0), max(high, ax.get_ylim()[1])
    if high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.002, 0.998])
    margin = 0.05 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _draw_histograms(ax: Axes, data: np.ndarray, samples: np.ndarray, limits: tuple[float, float]) -> None:
    """Bins that suit the number of rows, by Freedman and Diaconis."""
    inside = data[(data >= limits[0]) & (data <= limits[1])]
    bins = np.histogram_bin_edges(inside, "fd", limits)
    if not 5 <= len(bins) <= 61:
        bins = np.linspace(*limits, min(max(len(bins), 5), 61))
    # Divided by all, so that what lies outside of the histogram is missing from it.
    of_data, of_samples = (np.full(len(rows), 1 / (len(rows) * (bins[1] - bins[0]))) for rows in (data, samples))
    edges = bins.tolist()
    ax.hist(data, edges, weights=of_data, color=_COLORS[0])
    ax.hist(samples, edges, weights=of_samples, histtype="step", color=_COLORS[1])


def _extent(data: Tensor) -> tuple[list[float], list[float]]:
    """The corners of a square around the data."""
    low, high = data.amin(dim=0), data.amax(dim=0)
    centre, half = (low + high) / 2, 0.55 * (high - low).max()
    return (centre - half).tolist(), (centre + half).tolist()


def _scatter(ax: Axes, points: Tensor) -> None:
    x, y = points.float().cpu().numpy().T
    ax.scatter(x, y, s=2, color="C0", alpha=0.35, linewidths=0, rasterized=True)


def _grid(count: int, low: Sequence[float], high: Sequence[float], device: torch.device) -> Tensor:
    """Points `(count * count, 2)`, row by row."""
    grids = [torch.linspace(a, b, count, device=device) for a, b in zip(low, high, strict=True)]
    return torch.stack(torch.meshgrid(*grids, indexing="xy"), dim=-1).view(-1, 2)


def _draw_log_density(
    ax: Axes, log_prob: Field, device: torch.device, low: Sequence[float], high: Sequence[float]
) -> None:
    points = _grid(_GRID, low, high, device)
    values = torch.cat([log_prob(chunk) for chunk in points.split(2_000)]).view(_GRID, _GRID).float().cpu().numpy()
    top = float(values.max())
    image = ax.imshow(
        values,
        extent=(low[0], high[0], low[1], high[1]),
        origin="lower",
        vmin=top - _NATS_SHOWN,
        vmax=top,
        cmap="viridis",
    )
    ax.figure.colorbar(image, ax=ax, label=r"$\log p(x)$ (nats)", fraction=0.046, pad=0.03, extend="min")


def _draw_score(ax: Axes, score: Field, data: Tensor, low: Sequence[float], high: Sequence[float]) -> None:
    """Arrows where there are data nearby, since elsewhere nothing teaches the score; long ones are shortened."""
    points = _grid(_ARROWS, low, high, data.device)
    spacing = (high[0] - low[0]) / (_ARROWS - 1)
    points = points[torch.cdist(points, data.to(points)).amin(dim=1) < 2 * spacing]
    arrows = score(points).float()
    lengths = arrows.norm(dim=1, keepdim=True)
    shortened = arrows / lengths.clamp_min(1e-12) * spacing * torch.tanh(lengths / lengths.median())
    x, y, u, v = (column.cpu().numpy() for column in (*points.T, *shortened.T))
    ax.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=1, color="C1", width=0.004)


def _draw_paths(ax: Axes, paths: Tensor) -> None:
    """Draw each path in the colour of its initial direction, so that near ones can be told apart."""
    points = paths.float().cpu().numpy()
    angles = np.arctan2(*(points[0] - points[0].mean(axis=0)).T[::-1])
    colors = colormaps["hsv"](angles / (2 * np.pi) + 0.5) * [0.85, 0.85, 0.85, 1]
    for i, color in enumerate(colors):
        ax.plot(*points[:, i].T, color=color, linewidth=0.8, zorder=1)
    hollow: dict[str, Any] = {"s": 9, "facecolors": "white", "linewidths": 0.8}
    base, data = points[0].T, points[-1].T
    ax.scatter(base[0], base[1], edgecolors=colors, zorder=2, **hollow)
    ax.scatter(data[0], data[1], s=9, c=colors, zorder=3)
    low, high = _extent(paths.flatten(0, 1).float())
    ax.set(title="Trajectories", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    ax.scatter([], [], edgecolors="0.3", label="base", **hollow)
    ax.scatter([], [], s=9, color="0.3", label="data")
    ax.legend(frameon=False, fontsize="small", loc="upper right", handletextpad=0.2)


def _tile(images: Tensor, rows: int, columns: int) -> np.ndarray:
    """Images in rows and columns, a pixel of background between them: `(height, width)` or with colours."""
    if images.ndim == 2:
        side = math.isqrt(images.shape[1])
        images = images.view(-1, 1, side, side)
    channels, height, width = images.shape[1:]
    tile = torch.zeros(rows * (height + 1), columns * (width + 1), channels, device="cpu")
    for i, image in enumerate(images.float().cpu()):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        tile[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return tile.clamp(0, 1).squeeze(-1).numpy()

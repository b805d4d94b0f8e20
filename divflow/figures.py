"""Figures of a density: of data in the plane, of images, of the columns of a table."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["plot_images", "plot_marginals", "plot_plane"]

Field = Callable[[Tensor], Tensor]

_GRID = 120
_ARROWS = 22
_NATS_SHOWN = 10.0


@torch.no_grad()
def plot_plane(
    data: Tensor,
    samples: Tensor,
    log_prob: Field | None = None,
    score: Field | None = None,
    paths: Tensor | None = None,
    name: str = "Log-density",
) -> Figure:
    """A density in the plane: data and samples, and what else is known of it.

    Args:
        data: `(n, 2)`.
        samples: `(n, 2)`.
        log_prob: function of points `(k, 2)`, `(k,)`, in nats; drawn as an image.
        score: function of points `(k, 2)`, `(k, 2)`; drawn as arrows over the log-density, or over the data.
        paths: trajectories `(times, k, 2)` from the base to the data.
        name: of the log-density, for the title.
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
    """A grid of images of the data beside one of samples.

    Args:
        data: grey images `(n, height * width)` (square) or `(n, channels, height, width)`, values in [0, 1].
        samples: likewise.
        rows: images on each side of a grid.
    """
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    for ax, images, title in zip(figure.subplots(1, 2), (data, samples), ("Data", "Samples of the model"), strict=True):
        ax.imshow(_tile(images[: rows**2], rows), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title)
        ax.set_axis_off()
    return figure


def plot_marginals(data: Tensor, samples: Tensor, names: Sequence[str], columns: int = 8) -> Figure:
    """Histograms of the first columns of a table, of data and of samples.

    Args:
        data: `(n, D)`.
        samples: `(n, D)`.
        names: of the columns.
        columns: how many are drawn.
    """
    count = min(columns, data.shape[1])
    figure = Figure(figsize=(13, 3.2 * math.ceil(count / 4)), layout="constrained")
    for i, ax in enumerate(figure.subplots(math.ceil(count / 4), 4, squeeze=False).flat):
        if i >= count:
            ax.set_axis_off()
            continue
        values = data[:, i].cpu().numpy()
        low, high = np.quantile(values, [0.002, 0.998])
        bins = np.linspace(low, high, 50)
        ax.hist(values, bins, density=True, color="0.8", label="data")
        ax.hist(
            samples[:, i].cpu().numpy(), bins, density=True, histtype="step", color="C0", label="samples of the model"
        )
        ax.set(xlabel=names[i], ylabel="density" if i % 4 == 0 else "")
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure


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
    points = paths.float().cpu().numpy()
    ax.plot(points[:, :, 0], points[:, :, 1], color="0.6", linewidth=0.6, zorder=1)
    ax.scatter(points[0, :, 0], points[0, :, 1], s=7, color="C1", label="base", zorder=2)
    ax.scatter(points[-1, :, 0], points[-1, :, 1], s=7, color="C0", label="data", zorder=2)
    ax.set_title("Trajectories")
    ax.legend(frameon=False, fontsize="small", loc="upper right", handletextpad=0.2)


def _tile(images: Tensor, rows: int) -> np.ndarray:
    """Images in a square of `rows` each side, a pixel of white between them: `(height, width)` or with colours."""
    if images.ndim == 2:
        side = math.isqrt(images.shape[1])
        images = images.view(-1, 1, side, side)
    channels, height, width = images.shape[1:]
    tile = torch.zeros(rows * (height + 1), rows * (width + 1), channels)
    for i, image in enumerate(images.float().cpu()):
        top, left = i // rows * (height + 1), i % rows * (width + 1)
        tile[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return tile.clamp(0, 1).squeeze(-1).numpy()

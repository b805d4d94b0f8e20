"""Figures of densities on manifolds: world maps, squares of two angles, axes of rotations."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from divflow.callbacks.plots import plot_pairs
from divflow.manifolds import LatitudeLongitude, Manifold, SpecialOrthogonal, Sphere, Torus, WrappedAngles, quaternion

__all__ = ["plot_angles", "plot_map", "plot_on_manifold", "plot_rotations"]

Field = Callable[[Tensor], Tensor]

_ROWS = 90  # of a grid; a map has twice as many columns
_NATS_SHOWN = 10.0
_TITLES = "Data", "Samples of the model"
_NAME = "Log-density"


def plot_on_manifold(
    manifold: Manifold,
    data: Tensor,
    samples: Tensor,
    log_prob: Field | None = None,
    names: Sequence[str] | None = None,
    name: str = _NAME,
) -> Figure:
    """Plot a density on a manifold, as suits it.

    | manifold | figure |
    |---|---|
    | `Sphere(2)` | a world map of data, samples and log-density |
    | `Torus(2)` | the square of two angles, with data, samples and log-density |
    | another `Torus` | histograms and pairs of the first angles, in degrees |
    | `SpecialOrthogonal()` | the axes of data and samples on a map, coloured by angle |
    | others | histograms and pairs of the ambient coordinates |

    Args:
        manifold: of the points.
        data: points `(n, *event)`.
        samples: points `(m, *event)`.
        log_prob: function of points `(k, *event)` that returns log-densities `(k,)` in nats, where it can be drawn.
        names: names of angles, or of ambient coordinates.
        name: name of the log-density, for the title.
    """
    if isinstance(manifold, Sphere) and manifold.dim == 2:
        return plot_map(data, samples, log_prob, name)
    if isinstance(manifold, Torus):
        data, samples = (points * (2 * torch.pi / manifold.period) for points in (data, samples))
        unit = manifold.period / (2 * torch.pi)
        in_radians = None if log_prob is None else lambda x: log_prob(x * unit)
        return plot_angles(data, samples, in_radians, names, name)
    if isinstance(manifold, SpecialOrthogonal):
        return plot_rotations(data, samples)
    data, samples = data.flatten(1), samples.flatten(1)
    return plot_pairs(data, samples, names or [f"$x_{{{i + 1}}}$" for i in range(data.shape[1])])


@torch.no_grad()
def plot_map(data: Tensor, samples: Tensor, log_prob: Field | None = None, name: str = _NAME) -> Figure:
    """Plot a density on the sphere as maps of the world, of equal areas.

    Args:
        data: unit vectors `(n, 3)`.
        samples: unit vectors `(m, 3)`.
        log_prob: function of unit vectors `(k, 3)` that returns log-densities `(k,)` in nats.
        name: name of the log-density, for the title.
    """
    figure, axes = _maps(2 + (log_prob is not None))
    for ax, points, title in zip(axes, (data, samples), _TITLES, strict=False):
        latitude, longitude = _located(points)
        ax.scatter(longitude, latitude, s=2, color="C0", alpha=0.35, linewidths=0, rasterized=True)
        ax.set_title(title)
    if log_prob is not None:
        coordinates = LatitudeLongitude("radians")
        edges = [
            torch.linspace(-a, a, n + 1, dtype=torch.float64) for a, n in ((torch.pi / 2, _ROWS), (torch.pi, 2 * _ROWS))
        ]
        middles = torch.cartesian_prod(*((it[1:] + it[:-1]) / 2 for it in edges))
        values = _values(log_prob, coordinates.points(middles).to(data)).reshape(_ROWS, 2 * _ROWS)
        latitude, longitude = (it.numpy() for it in edges)
        image = axes[2].pcolormesh(longitude, latitude, values, rasterized=True, **_scale(values))
        _finish_density(figure, axes[2], image, name)
    return figure


@torch.no_grad()
def plot_angles(
    data: Tensor, samples: Tensor, log_prob: Field | None = None, names: Sequence[str] | None = None, name: str = _NAME
) -> Figure:
    """Plot a density of angles in degrees: two in their square, as a Ramachandran plot; others as pairs and histograms.

    Args:
        data: radians `(n, angles)`.
        samples: radians `(m, angles)`.
        log_prob: function of radians `(k, 2)` that returns log-densities `(k,)` in nats; drawn for two angles alone.
        names: names of the angles.
        name: name of the log-density, for the title.
    """
    count = data.shape[1]
    names = names or [rf"$\varphi_{{{i + 1}}}$" for i in range(count)]
    degrees = WrappedAngles(count)
    of_data, of_samples = (degrees.rows(points) for points in (data, samples))
    if count != 2:
        return plot_pairs(of_data, of_samples, [f"{it} (degrees)" for it in names])
    number = 2 + (log_prob is not None)
    figure = Figure(figsize=(3.25 * number, 3.3), layout="constrained")
    axes = figure.subplots(1, number)
    for ax, points, title in zip(axes, (of_data, of_samples), _TITLES, strict=False):
        x, y = points.float().cpu().numpy().T
        ax.scatter(x, y, s=2, color="C0", alpha=0.35, linewidths=0, rasterized=True)
        ax.set_title(title)
    if log_prob is not None:
        edges = torch.linspace(-180, 180, 2 * _ROWS + 1, dtype=torch.float64)
        middle = (edges[1:] + edges[:-1]) / 2
        grid = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1).reshape(-1, 2)
        values = _values(log_prob, degrees.points(grid).to(data)).reshape(len(middle), -1)
        image = axes[2].imshow(values, extent=(-180, 180, -180, 180), origin="lower", **_scale(values))
        _finish_density(figure, axes[2], image, name)
    for ax in axes:
        ax.set(xlim=(-180, 180), ylim=(-180, 180), aspect="equal", xlabel=f"{names[0]} (degrees)")
        ax.set(xticks=range(-180, 181, 90), yticks=range(-180, 181, 90))
    axes[0].set_ylabel(f"{names[1]} (degrees)")
    return figure


@torch.no_grad()
def plot_rotations(data: Tensor, samples: Tensor) -> Figure:
    """Plot rotations by their axes, on maps of equal areas, coloured by the angle from 0 to 180 degrees.

    Args:
        data: rotation matrices `(n, 3, 3)`.
        samples: rotation matrices `(m, 3, 3)`.
    """
    figure, axes = _maps(2)
    for ax, points, title in zip(axes, (data, samples), _TITLES, strict=True):
        q = quaternion(points.double().cpu())
        sine = torch.linalg.vector_norm(q[:, 1:], dim=1)
        angle = torch.rad2deg(2 * torch.atan2(sine, q[:, 0]))
        latitude, longitude = _located(q[:, 1:])
        shown = ax.scatter(
            longitude, latitude, s=3, c=angle.numpy(), vmin=0, vmax=180, cmap="viridis", linewidths=0, rasterized=True
        )
        ax.set_title(f"{title}: axes")
    figure.colorbar(
        shown, ax=axes, label="angle (degrees)", fraction=0.02, pad=0.02, shrink=0.75, ticks=range(0, 181, 45)
    )
    return figure


def _maps(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 2.9), layout="constrained")
    axes = cast(list[Axes], list(figure.subplots(1, count, subplot_kw={"projection": "mollweide"})))
    for ax in axes:
        ax.set_xticks(np.deg2rad([-120, -60, 0, 60, 120]))
        ax.set_yticks(np.deg2rad([-60, -30, 0, 30, 60]))
        ax.set_xticklabels([])  # which would stand among the points
        ax.tick_params(labelsize="x-small", colors="0.4")
        ax.grid(color="0.85", linewidth=0.5)
        ax.set_axisbelow(True)
    return figure, axes


def _located(points: Tensor) -> np.ndarray:
    """Latitudes and longitudes in radians, `(2, n)`."""
    return LatitudeLongitude("radians").rows(points.double().cpu()).numpy().T


def _values(log_prob: Field, points: Tensor) -> np.ndarray:
    return torch.cat([log_prob(part) for part in points.split(2_000)]).float().cpu().numpy()


def _scale(values: np.ndarray) -> dict[str, Any]:
    top = float(values.max())
    return {"vmin": top - _NATS_SHOWN, "vmax": top, "cmap": "viridis"}


def _finish_density(figure: Figure, ax: Axes, image: Any, name: str) -> None:
    ax.set_title(name)
    figure.colorbar(image, ax=ax, label=r"$\log p(x)$ (nats)", fraction=0.046, pad=0.03, shrink=0.85, extend="min")

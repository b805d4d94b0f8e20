"""The pictures of the guide that explain, and time nothing.

    python tests/benchmarks/pictures.py layered.png colors.png

draws these two, and all of them if none is named. `noise_to_data.png` and `nodes.png` show the flow of `python train.py task=flow_matching`,
`sphere_mixture.png` and `torus_paths.png` those of `data=sphere_mixture` and `data=torus_mixture`; flows that `outputs/benchmarks` does not hold are
trained first.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from drawing import BLUE, GREEN, OURS, PINK, SKY, figure, save  # noqa: E402 - the folders are no packages
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import PowerNorm  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402
from run import config  # noqa: E402

import divflow  # noqa: E402
import divflow.data.toy  # noqa: E402
from divflow.callbacks.manifold_plots import plot_map  # noqa: E402
from divflow.divergence import Estimate, Estimator, Exact  # noqa: E402
from divflow.divergence.exact.colored import colors as colored  # noqa: E402
from divflow.flow import ContinuousFlow  # noqa: E402
from divflow.likelihood import Quadrature  # noqa: E402
from divflow.networks import ConvNet  # noqa: E402
from divflow.operators.linearization import linearize_field  # noqa: E402
from divflow.runs.experiment import train  # noqa: E402
from divflow.solver import Solver  # noqa: E402
from divflow.solver.step_control import StepTimes  # noqa: E402

FOLDER = HERE.parents[1] / "outputs" / "benchmarks"


def trained_flow(data: str = "two_moons") -> ContinuousFlow:
    """The flow of `python train.py task=flow_matching` for some data."""
    folder = FOLDER / data
    checkpoint = folder / "checkpoints" / "best.ckpt"
    if not checkpoint.is_file():
        words = "task=flow_matching", f"data={data}", "callbacks.figures=null", "device=cpu", f"output_dir={folder}"
        with torch.enable_grad():  # after which the mode is the caller's again
            train(config(*words))
    return divflow.load(checkpoint).flow.replace(likelihood=Quadrature(15), solver=Solver("dopri5", 1e-5, 1e-5))


@torch.no_grad()
def noise_to_data() -> None:
    """The density that a flow has at times between the base and the data, and the same samples at all of them."""
    flow, times, width = trained_flow(), (0.0, 0.25, 0.5, 0.75, 1.0), 2.6
    line = torch.linspace(-width, width, 121)
    grid = torch.cartesian_prod(line, line)
    paths = flow.trajectory(flow.sample_base(250, Generator().manual_seed(0)), times)
    drawn = figure(2.15)
    axes = drawn.subplots(1, len(times), sharey=True)
    for ax, t, points in zip(axes, times, paths, strict=True):
        until = (
            ContinuousFlow(flow.velocity, 2, t_data=t, likelihood=flow.likelihood, solver=flow.solver)
            if t
            else flow.base
        )
        density = until.log_prob(grid).exp().view(len(line), -1).T
        image = ax.imshow(
            density, extent=(-width, width) * 2, origin="lower", cmap="Blues", norm=PowerNorm(0.5, 0, 0.8)
        )
        ax.plot(*points.T, color=OURS, markersize=1.5, marker=".", linestyle="")
        ax.set(xlim=(-width, width), ylim=(-width, width), xlabel="$x_1$", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        ax.set_title(f"t = {t:g}" + {0.0: ", base", 1.0: ", data"}.get(t, ""), fontsize=9)
    axes[0].set_ylabel("$x_2$")
    drawn.colorbar(image, ax=axes, label="density", extend="max", pad=0.01)
    save(drawn, "noise_to_data.png")


@dataclass(frozen=True)
class Noted(Estimator):
    """The exact divergence, with the times, states and values of its calls."""

    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def estimate(
        self, g: divflow.divergence.Field, t: Tensor, x: Tensor, generator: Generator | None = None
    ) -> Estimate:
        """Of one sample at one time or several."""
        found = Exact().estimate(g, t, x, generator)
        self.calls.append((t.reshape(-1), x, found.divergence))
        return found


@dataclass(frozen=True)
class Watched(Solver):
    """Keeps when its steps began."""

    steps: list[StepTimes] = field(default_factory=list)

    def solve(self, *arguments: object, accepted: StepTimes, **options: object) -> object:
        """As `Solver` does."""
        self.steps.append(accepted)
        return super().solve(*arguments, accepted=accepted, **options)


@torch.no_grad()
def nodes() -> None:
    """One solve of `Quadrature` with a tolerance: the solver's steps, and the nodes of each round."""
    flow, noted, watched = trained_flow(), Noted(), Watched("dopri5", 1e-5, 1e-5)
    x = flow.decode(torch.tensor([[1.3, 1.1]]))
    found = flow.replace(estimator=noted, likelihood=Quadrature(tolerance=1e-3), solver=watched).evaluate(
        x, diagnostics=False
    )
    (steps,) = watched.steps
    begun = steps.halves()[: len(steps)].float()
    times = torch.linspace(0, 1, 201)
    path = flow.trajectory(flow.encode(x), times)
    divergence = torch.stack(
        [Exact()(flow.velocity, t, state).divergence[0] for t, state in zip(times, path, strict=True)]
    )
    at_steps = flow.trajectory(x, sorted([*begun.tolist(), 0.0], reverse=True))[:, 0]

    drawn = figure(3.2)
    plane, along = drawn.subplots(1, 2, width_ratios=(1, 1.5))
    plane.plot(*path[:, 0].T, color="0.5", marker="")
    along.plot(times, divergence, color="0.5", marker="", label="divergence along the trajectory")
    along.fill_between(times, divergence, color="0.93")
    plane.plot(*at_steps.T, color="black", markersize=9, marker="|", linestyle="")
    along.plot(
        begun,
        torch.full_like(begun, float(divergence.min()) - 0.25),
        color="black",
        markersize=9,
        marker="|",
        linestyle="",
        label=f"{len(steps)} steps of the solver",
    )
    for (t, states, values), color, marker in zip(noted.calls, (BLUE, OURS, GREEN, PINK), "osDv", strict=False):
        label = f"{len(t)} nodes" if color == BLUE else f"{len(t)} more"
        plane.plot(*states.T, color=color, markersize=4.5, marker=marker, linestyle="")
        along.plot(t, values, color=color, markersize=4.5, marker=marker, linestyle="", label=label)
    for name, point in (("base, t = 0", path[0, 0]), ("data, t = 1", path[-1, 0])):
        plane.annotate(name, point.tolist(), xytext=(8, 0), textcoords="offset points", va="center")
    plane.set(xlabel="$x_1$", ylabel="$x_2$")
    plane.margins(0.25, 0.1)
    along.set(xlabel="time t", ylabel=r"$\mathrm{div}\,v(t, x_t)$, nats per unit of time")
    along.set_title(
        f"log p = {found.log_prob.item():.3f} nats, quadrature error {found.quadrature_error.item():.0e} nats",
        fontsize=9,
    )
    along.legend(frameon=False, fontsize=8)
    save(drawn, "nodes.png")


def colors() -> None:
    """The colours that `Exact` finds for the pixels of two 3x3 convolutions, and what one product asks of them."""
    side = 12
    net, t, x = ConvNet((1, side, side), hidden=(8,)), torch.tensor(0.5), torch.randn(16, 1, side, side)
    found = colored.find(net, t, x, linearize_field(net, t, x))
    assert Exact().explain(net, t, x).products == len(found.colors)
    number = found.colors.int().argmax(dim=0).view(side, side)
    pixel = (6, 4)
    row, column = (places.tolist() for places in found.seen[pixel[0] * side + pixel[1]].view(side, side).nonzero().T)
    radius = max(row) - pixel[0]

    drawn = figure(3.9)
    every, one = drawn.subplots(1, 2)
    shades = np.array([[0x56, 0xB4, 0xE9], [0xE6, 0x9F, 0x00], [0x00, 0x9E, 0x73], [0xF0, 0xE4, 0x42], [0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00], [0xCC, 0x79, 0xA7], [0x99, 0x99, 0x99], [0xFF, 0xFF, 0xFF]])  # fmt: skip
    every.imshow(shades[number % len(shades)])
    chosen = int(number[pixel])
    for i, j in itertools.product(range(side), repeat=2):
        dark = shades[number[i, j]].sum() < 330
        every.text(
            j, i, str(int(number[i, j]) + 1), ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )
    every.add_patch(
        Rectangle(
            (min(column) - 0.5, min(row) - 0.5),
            max(column) - min(column) + 1,
            max(row) - min(row) + 1,
            fill=False,
            linewidth=2.5,
        )
    )
    every.set_title(f"{len(found.colors)} colours for {side * side} pixels", fontsize=9)
    pixels = np.zeros((side, side, 4))
    pixels[number == chosen] = [*shades[chosen] / 255, 1]
    one.imshow(pixels, zorder=2)
    for (i, j), style in ((pixel, "-"), ((pixel[0], pixel[1] + radius + 1), "--")):
        corner, width = (j - radius - 0.5, i - radius - 0.5), 2 * radius + 1
        one.add_patch(Rectangle(corner, width, width, facecolor="0.7", alpha=0.4, linewidth=0))
        one.add_patch(Rectangle(corner, width, width, fill=False, linewidth=2.5, linestyle=style, zorder=1.5))
    one.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
    one.set_title(f"the pixels of colour {chosen + 1}, and what two of them see", fontsize=9)
    for ax in (every, one):
        ax.set(xlabel="column", ylabel="row", xticks=range(0, side, 3), yticks=range(0, side, 3))
        ax.spines[["top", "right"]].set_visible(True)
    save(drawn, "colors.png")


def layered() -> None:
    """The path of a trace through a network of two hidden layers, closed from the output to the input, and where it is cut."""
    drawn = figure(3.1)
    ax = drawn.add_subplot(xlim=(0, 16), ylim=(-0.4, 5.8))
    ax.set_axis_off()
    ax.add_patch(
        FancyBboxPatch((6.55, 2.35), 2.9, 1.5, boxstyle="round,pad=0.1", facecolor=SKY, alpha=0.35, edgecolor="none")
    )
    places = {"$x$": 0.6, "$W_1$": 2.8, "$s_1$": 5.4, "$W_2$": 8.0, "$s_2$": 10.6, "$W_3$": 13.2, "$g$": 15.4}
    notes = {"$W_1$": "Linear", "$s_1$": "activation", "$W_2$": "Linear", "$s_2$": "activation", "$W_3$": "Linear"}
    for name, place in places.items():
        _place(ax, name, place, notes.get(name))
    for before, after in itertools.pairwise(places.values()):
        _arrow(ax, (before + 0.62, 3.1), (after - 0.62, 3.1))
    ax.plot([15.4, 15.4, 0.6, 0.6], [3.55, 5.1, 5.1, 3.75], color=GREEN, linewidth=2, marker="")
    _arrow(ax, (0.6, 4.3), (0.6, 3.55), GREEN)
    ax.text(
        8,
        5.25,
        r"the trace joins the output to the input: $W_1 W_3$, one $H \times H$ matrix",
        ha="center",
        va="bottom",
        color=GREEN,
    )
    ax.text(8, 4.12, r"$W_2$, $H \times H$", ha="center", va="center", color=BLUE)
    for place in (5.4, 10.6):
        ax.plot([place, place], [2.3, 4.6], "--", color=OURS, marker="", zorder=0)
        ax.text(place, 4.62, "cut", ha="center", va="bottom", color=OURS)
    formula = (
        (r"$\mathrm{tr}\,(W_3\, S_2\, W_2\, S_1\, W_1) = $", "black"),
        (r"$s_2^{\top}$", OURS),
        (r"$\,(\,$", "black"),
        (r"$W_2$", BLUE),
        (r"$\,\odot\,$", "black"),
        (r"$(W_1 W_3)^{\top}$", GREEN),
        (r"$\,)\,$", "black"),
        (r"$s_1$", OURS),
    )
    _in_a_row(ax, formula, 3.6, 0.6)
    ax.text(
        8,
        -0.25,
        "weights, once for the batch: blue and green;  slopes of the activations, for each sample: vermilion",
        ha="center",
        va="center",
        fontsize=8,
    )
    save(drawn, "layered.png")


def _place(ax: Axes, name: str, place: float, note: str | None) -> None:
    round_, color = name[1] == "s", {"s": OURS, "W": BLUE if "2" in name else GREEN}.get(name[1], "black")
    if note:
        style = "circle,pad=0.3" if round_ else "square,pad=0.45"
        ax.text(
            place,
            3.1,
            name,
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": style, "facecolor": "white", "edgecolor": color, "linewidth": 2},
        )
        ax.text(place, 2.0, note, ha="center", va="center", fontsize=8)
    else:
        ax.text(place, 3.1, name, ha="center", va="center", fontsize=14)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=color, shrinkA=0, shrinkB=0))


def _in_a_row(ax: Axes, parts: tuple[tuple[str, str], ...], x: float, y: float) -> None:
    """Texts of several colours, one after the other."""
    ax.figure.canvas.draw()
    ax.figure.set_layout_engine("none")
    for text, color in parts:
        written = ax.annotate(text, (x, y), color=color, fontsize=15, va="baseline")
        x = ax.transData.inverted().transform(written.get_window_extent().get_points())[1, 0]


@torch.no_grad()
def sphere_mixture() -> None:
    """Data, samples and log-density of a flow on the sphere."""
    flow, data = trained_flow("sphere_mixture"), divflow.data.toy.sphere_mixture()
    torch.manual_seed(0)
    drawn = plot_map(data.sample(2_000), flow.sample(2_000), flow.log_prob)
    drawn.set_size_inches(12, 2.8)
    save(drawn, "sphere_mixture.png")


@torch.no_grad()
def torus_paths() -> None:
    """The paths of samples on the torus from the base, over the log-density; they leave on one side and come back on the other."""
    flow = trained_flow("torus_mixture")
    line = (torch.arange(120) + 0.5) * 2 * torch.pi / 120 - torch.pi
    density = flow.log_prob(torch.cartesian_prod(line, line)).view(120, 120).T
    paths = flow.trajectory(flow.sample_base(40, Generator().manual_seed(1)), torch.linspace(0, 1, 60).tolist())
    degrees = paths.rad2deg().transpose(0, 1)
    drawn = figure(3.6)
    drawn.set_size_inches(4.8, 3.8)
    ax = drawn.subplots()
    image = ax.imshow(density, extent=(-180, 180) * 2, origin="lower", cmap="Blues", vmin=density.max() - 10)
    for path in degrees:
        apart = (path[1:] - path[:-1]).abs().amax(dim=1) > 180  # at the end of a period
        pieces = torch.where(torch.cat([apart, apart.new_zeros(1)])[:, None], torch.nan, path)
        ax.plot(*pieces.T, color="0.3", linewidth=0.7, marker="")
        ax.plot(*path[-1], color=OURS, marker=".", markersize=5)
    ticks = (-180, -90, 0, 90, 180)
    ax.set(
        xlim=(-180, 180),
        ylim=(-180, 180),
        xticks=ticks,
        yticks=ticks,
        xlabel="first angle (degrees)",
        ylabel="second angle",
    )
    drawn.colorbar(image, ax=ax, label="log p (nats)", extend="min")
    save(drawn, "torus_paths.png")


PICTURES = {"noise_to_data.png": noise_to_data, "nodes.png": nodes, "colors.png": colors, "layered.png": layered}
PICTURES |= {"sphere_mixture.png": sphere_mixture, "torus_paths.png": torus_paths}


def main(*names: str) -> None:
    """Draw the pictures named, or all."""
    torch.manual_seed(0)
    for name in names or PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The tables of docs/benchmarks.md, and its figures: everything that divflow claims to be faster or better at, measured.

    pip install -c constraints.txt -e ".[test,bench]" && python tests/benchmarks/table.py

takes about a quarter of an hour; `python tests/benchmarks/table.py wide growth` measures these rows alone.
"""

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parents[1] / "examples")]

import drawing  # noqa: E402 - the folders are no packages
import exact  # noqa: E402
import following  # noqa: E402
import laplacian  # noqa: E402
import on_manifolds  # noqa: E402
import opaque  # noqa: E402
import residual  # noqa: E402
import score_step  # noqa: E402
import training_step  # noqa: E402
import variance  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

FOLDER = HERE.parents[1] / "outputs" / "benchmarks" / "digits"
PARTS = {
    "wide": exact.wide,
    "large": exact.large,
    "growth": exact.growth,
    "normalized": exact.normalized,
    "deep": exact.deep,
    "steps": training_step.steps,
    "nested": training_step.nested,
    "convolutions": exact.convolutions,
    "known": exact.known,
    "laplacian": lambda: laplacian.four_hidden(32) + laplacian.four_hidden(256),
    "gradient_field": laplacian.two_hidden,
    "manifolds": lambda: on_manifolds.exact() + on_manifolds.probes(),
    "residual": residual.steps,
    "opaque": opaque.one_operation,
    "following": following.calls,
    "score": lambda: score_step.steps() + score_step.gradient_noise(),
    "variance": lambda: variance.reduction(FOLDER),
}


def _axes(title: str, xlabel: str, ylabel: str, ticks: Sequence[int]) -> Axes:
    """Of a figure of its own, both axes logarithmic."""
    axes = drawing.figure(4.0).subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    return axes


def _save(axes: Axes, name: str) -> None:
    """Into the guide."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    drawing.save(axes.figure, name)


OURS = {"linewidth": 2.5, "color": drawing.OURS, "marker": "o", "markersize": 7}


def cost() -> None:
    """The cost of the exact divergence against D, beside that of other libraries' ways."""
    title = "Two hidden layers of 256, batch 256"
    axes = _axes(title, "dimensions D", "time of value and divergence, ms", exact.DIMENSIONS)
    dashed = {"linestyle": "--"}
    styles = {"divflow": OURS, "one probe": dashed, "forward pass": {"color": "0.5", **dashed}}
    for name, seconds in exact.against_dimension(peers=True).items():
        milliseconds = [1e3 * s for s in seconds]
        axes.plot(exact.DIMENSIONS[: len(seconds)], milliseconds, label=name, **styles.get(name, {}))
    _save(axes, "cost.png")


def spread() -> None:
    """The variance of log p against the number of products."""
    title = "Estimates: a flow trained on the digits, D = 64"
    axes = _axes(title, "vector-Jacobian products for one log p", "variance of log p, nats²", (15, 30, 60, 120, 240))
    for name, (products, variances) in variance.against_products(FOLDER).items():
        axes.plot(products, variances, label=name, **(OURS if "divflow" in name else {}))
    _save(axes, "variance.png")


FIGURES = {"cost.png": cost, "variance.png": spread}


def main(*names: str) -> None:
    """Print the rows of the parts named and draw the figures named, all of them if none is."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    print(f"{platform.processor() or platform.machine()}, 2 threads, torch {torch.__version__}\n")
    print("| what | measured against | asked for | measured |\n|---|---|---|---|")
    for name in names or (*PARTS, *FIGURES):
        if name in FIGURES:
            FIGURES[name]()
            continue
        for row in PARTS[name]():
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

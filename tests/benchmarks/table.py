"""The table of the README, and its figure: everything that divflow claims to be faster or better at, measured.

    pip install -c constraints.txt -e ".[test,bench]" && python tests/benchmarks/table.py

takes about a quarter of an hour; `python tests/benchmarks/table.py wide growth` measures these rows alone.
"""

import platform
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parents[1] / "examples")]

import exact  # noqa: E402 - the folders are no packages
import laplacian  # noqa: E402
import residual  # noqa: E402
import score_step  # noqa: E402
import training_step  # noqa: E402
import variance  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

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
    "residual": residual.steps,
    "score": lambda: score_step.steps() + score_step.gradient_noise(),
    "variance": lambda: variance.reduction(FOLDER),
}


def figure() -> None:
    """Cost of the exact divergence against D, and variance against the number of products."""
    others = plt.cycler(color=["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive"])
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": others}
    )
    axes = plt.figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    styles = {"divflow": {"linewidth": 2.5, "color": "tab:red"}, "forward pass": {"color": "0.5", "linestyle": "--"}}
    for name, seconds in exact.against_dimension(peers=True).items():
        axes[0].loglog(
            exact.DIMENSIONS[: len(seconds)], [1e3 * s for s in seconds], marker="o", label=name, **styles.get(name, {})
        )
    axes[0].set(xlabel="dimensions D", ylabel="ms, value and divergence", xticks=exact.DIMENSIONS)
    axes[0].set_xticks(exact.DIMENSIONS, [str(size) for size in exact.DIMENSIONS], minor=False)
    axes[0].minorticks_off()
    axes[0].set_title("Exact divergence: two hidden layers of 256, batch 256")
    for name, (products, variances) in variance.against_products(FOLDER).items():
        style = {"linewidth": 2.5, "color": "tab:red"} if "divflow" in name else {}
        axes[1].loglog(products, variances, marker="o", label=name, **style)
    axes[1].set(xlabel="vector-Jacobian products for one log p", ylabel="variance of log p, nats²")
    axes[1].set_title("Estimates: a flow trained on the digits, D = 64")
    ticks = (15, 30, 60, 120, 240)
    axes[1].set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes[1].minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].legend(frameon=False, fontsize=8, loc="lower left")
    axes[1].set_ylim(bottom=0.002)
    axes[0].figure.savefig(HERE / "figure.png", dpi=150)


def main(*names: str) -> None:
    """Print the rows of the parts named, all of them and the figure if none is."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    print(f"{platform.processor() or platform.machine()}, 2 threads, torch {torch.__version__}\n")
    print("| what | measured against | asked for | measured |\n|---|---|---|---|")
    for name in names or (*PARTS, "figure"):
        if name == "figure":
            figure()
            continue
        for row in PARTS[name]():
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

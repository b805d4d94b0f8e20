"""The tables of results in Markdown, of five columns at most, and their figure."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from results_rows import ROWS

matplotlib.use("agg")
from matplotlib import pyplot as plt

Result = dict[str, Any]
BEGIN, END = "<!-- written by tests/benchmarks/results.py -->", "<!-- end -->"
# The rows of the README, won and lost; docs/results.md has all.
HEADLINES = ("uci_casp", "uci_ccpp", "sbi_slcp", "digits_flow_matching", "mnist_flow_matching", "mnist_likelihood")


class Measures(NamedTuple):
    """A table of what `results_measures.py` has measured.

    Attributes:
        caption: above the table.
        labels: of the measures, by their names.
        transposed: whether the measures are its lines and the experiments its columns.
    """

    caption: str
    labels: dict[str, str]
    transposed: bool = False


MEASURED = (
    Measures(
        "**Posteriors.** C2ST is the accuracy of a classifier between the samples and the published ones. One half is best.",
        {"c2st": "C2ST, ± over observations", "log_prob_per_second": "log-probabilities per second"},
    ),
    Measures(
        "**Exact and estimated likelihoods** of 64 test rows. The estimate takes one product at each of 15 nodes. The error is that of one "
        "estimated log p, by probes that are orthogonal from node to node and by one fixed probe.",
        {
            "exact_seconds": "exact, s",
            "orthogonal_seconds": "estimated, s",
            "orthogonal_error": "error, orthogonal, nats",
            "fixed_error": "error, one fixed, nats",
        },
    ),
    Measures(
        "**Particles.** Each column is an experiment.",
        {
            "likelihoods_seconds": "10,000 exact likelihoods, s",
            "brute_force_seconds": "the same by a trace of products in the ODE, s",
            "effective_sample_fraction": "effective sample size, as a fraction",
            "log_normalizer": "log Z by exact weights, ± by their spread",
            "log_normalizer_reference": "known log Z",
            "exact_log_normalizer": "log Z by exact weights of 2,000 samples, less the known",
            "one_probe_log_normalizer": "the same by one probe that is fixed for the solve",
            "free_energy_difference": "free energy, outer less inner well, kT",
            "free_energy_difference_reference": "the same by quadrature of the energy, kT",
        },
        transposed=True,
    ),
)


def grouped(found: Sequence[Result]) -> list[list[Result]]:
    """The seeds of each row and model, in the order of the rows, ours first."""
    rows = list(ROWS)
    models = list(dict.fromkeys(["divflow", *(peer for row in ROWS.values() for peer in row.peers)]))
    ordered = sorted(found, key=lambda result: (rows.index(result["row"]), models.index(result["who"]), result["seed"]))
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda result: (result["row"], result["who"]))]


def likelihood(seeds: Sequence[Result]) -> tuple[str, float, float, float]:
    """The unit, the mean over seeds, and standard errors over test rows and over seeds (NaN for one seed)."""
    name = "bits_per_dim" if "bits_per_dim" in seeds[0]["metrics"] else "nll"
    values = np.array([result["metrics"][name] for result in seeds])
    rows = np.array([result["metrics"][f"{name}_standard_error"] for result in seeds])
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return ("bits/dim" if name == "bits_per_dim" else "nats"), values.mean(), np.sqrt((rows**2).mean()), spread


def quadrature(seeds: Sequence[Result]) -> float | None:
    """The mean quadrature error of a test row, in the unit of `likelihood`: what a mean may be off by, beside its ±; None where it is not known."""
    errors = []
    for metrics in (result["metrics"] for result in seeds):
        error = metrics.get("quadrature_error")
        if error is None:
            return None
        nats = (
            metrics["nll_standard_error"] / metrics["bits_per_dim_standard_error"] if "bits_per_dim" in metrics else 1.0
        )
        errors.append(
            metrics.get("bits_per_dim_quadrature_error", error / nats) if "bits_per_dim" in metrics else error
        )
    return float(np.mean(errors))


def shown(error: float | None) -> str:
    """An error of two digits; nothing for one that is not known."""
    return "" if error is None else f"{error:.1g}"


def coarse(seeds: Sequence[Result]) -> bool:
    """Whether the quadrature error is more than the standard error over rows."""
    error = quadrature(seeds)
    return error is not None and error > likelihood(seeds)[2]


def markdown(found: Sequence[Result]) -> str:
    """The tables of likelihoods, of their solves, of costs, of notes and of what else was measured: means over seeds, errors of one."""
    groups = grouped(found)
    likelihoods, solves, costs = [], [], []
    for seeds in groups:
        what = [ROWS[seeds[0]["row"]].what, seeds[0]["who"]]
        unit, mean, over_rows, over_seeds = likelihood(seeds)
        spread = "" if np.isnan(over_seeds) else f"{over_seeds:.3f} "
        likelihoods.append([*what, f"{mean:.3f} {unit}", f"{over_rows:.3f}", f"{spread}({len(seeds)})"])
        if evaluations(seeds):
            solves.append([*what, evaluations(seeds), shown(quadrature(seeds)), by_probes(seeds)])
        peak, size = average(seeds, "peak_memory_mib"), seeds[0]["parameters"]
        costs.append([*what, f"{average(seeds, 'seconds'):.0f}", f"{peak:.0f}", f"{size:,}"])
    notes = [[row.what, row.note] for name, row in ROWS.items() if row.note and name in {it["row"] for it in found}]
    for seeds in groups:
        if coarse(seeds):
            error = f"quadrature error {shown(quadrature(seeds))} {likelihood(seeds)[0]}"
            notes.append([ROWS[seeds[0]["row"]].what, f"{error}: more than its ± over rows, and not in it"])
    parts = [
        "**Likelihoods.** ± rows is the standard error over the test rows, ± seeds that over seeds, whose number is in brackets.",
        table(["data", "model", "NLL", "± rows", "± seeds"], likelihoods),
        "**Solves.** Evaluations of the field for the likelihood of a batch: by the solve + by the divergence, or one number for both. The errors "
        "are in the unit of the result, and not in its ±.",
        table(["data", "model", "evaluations", "quadrature error", "error by probes"], solves),
        "**Cost.** The peak is the memory of the whole process, Python and torch included.",
        table(["data", "model", "training, s", "peak, MiB", "parameters"], costs),
        table(["data", "what to know"], notes),
        *(part for measures in MEASURED for part in measured(measures, groups)),
    ]
    return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing without lines."""
    if not lines:
        return ""
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
        .replace("| ---", "|---")
        .replace("--- |", "---|")
    )


def measured(measures: Measures, groups: Sequence[Sequence[Result]]) -> list[str]:
    """Caption and table of what was measured of these; nothing where nothing was."""
    cells = [(seeds[0], [cell(seeds, name) for name in measures.labels]) for seeds in groups]
    cells = [(of, values) for of, values in cells if any(values)]
    if not cells:
        return []
    if measures.transposed:
        head = ["", *(f"`{of['row']}`" for of, _ in cells)]
        columns = zip(*(values for _, values in cells), strict=True)
        lines = [[label, *values] for label, values in zip(measures.labels.values(), columns, strict=True)]
        return [measures.caption, table(head, lines)]
    peers = len({of["who"] for of, _ in cells}) > 1
    head = ["data", *["model"] * peers, *measures.labels.values()]
    return [
        measures.caption,
        table(head, [[ROWS[of["row"]].what, *[of["who"]] * peers, *values] for of, values in cells]),
    ]


def cell(seeds: Sequence[Result], name: str) -> str:
    """The mean of a measure over seeds, and the error of one; nothing where it was not taken."""
    values = [result["metrics"][name] for result in seeds if name in result["metrics"]]
    if not any(values):
        return ""
    errors = [given for seed in seeds if (given := seed["metrics"].get(f"{name}_standard_error")) is not None]
    return f"{np.mean(values):.4g}" + (f" ± {np.sqrt(np.mean(np.square(errors))):.2g}" if errors else "")


def by_probes(seeds: Sequence[Result]) -> str:
    """The standard error that probes leave in the mean over rows, in bits/dim; nothing for exact divergences."""
    return cell(seeds, "bits_per_dim_estimator_error")


def average(seeds: Sequence[Result], name: str) -> float:
    """Over seeds."""
    return float(np.mean([result[name] for result in seeds]))


def evaluations(seeds: Sequence[Result]) -> str:
    """Of the field for the likelihood of a batch, for the solve and for the divergence, or of both at once; none in one pass."""
    metrics = [result["metrics"] for result in seeds]
    if "nfe" not in metrics[0]:
        return ""
    parts = [name for name in ("nfe", "nfe_divergence") if name in metrics[0]]
    return " + ".join(f"{np.mean([values[name] for values in metrics]):.0f}" for name in parts)


def draw(found: Sequence[Result], path: Path) -> None:
    """A panel for each row that has peers: the likelihood of each model, with bars of two standard errors over rows and seeds together."""
    groups = {row: list(models) for row, models in itertools.groupby(grouped(found), key=lambda seeds: seeds[0]["row"])}
    groups = {row: models for row, models in groups.items() if len(models) > 1}
    count = max(1, len(groups))
    columns = min(4, count)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(3 * columns, 2.6 * -(-count // columns)), layout="constrained")
    for i, (row, models) in enumerate(groups.items()):
        axes = figure.add_subplot(-(-count // columns), columns, i + 1)
        for place, seeds in enumerate(models):
            unit, mean, over_rows, over_seeds = likelihood(seeds)
            error = 2 * np.hypot(over_rows, np.nan_to_num(over_seeds))
            color = "tab:red" if seeds[0]["who"] == "divflow" else "0.4"
            axes.errorbar(place, mean, error, marker="o", capsize=3, color=color)
            axes.set_ylabel(f"NLL, {unit}")
        axes.set_xticks(range(len(models)), [seeds[0]["who"] for seeds in models], fontsize=8 if len(models) < 3 else 7)
        axes.set(title=row, xlim=(-0.5, max(1, len(models)) - 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def short(found: Sequence[Result]) -> str:
    """A line for each row: what every model reaches, with its error over test rows, the best in bold, and the command of ours."""
    lines = ["| data | divflow | peers | `python train.py` |", "|---|---|---|---|"]
    for name, models in itertools.groupby(grouped(found), key=lambda seeds: seeds[0]["row"]):
        models = list(models)
        reached = {seeds[0]["who"]: likelihood(seeds) for seeds in models}
        best = min(reached, key=lambda who: reached[who][1]) if len(reached) > 1 else None
        texts = {
            who: f"{'**' * (who == best)}{mean:.2f} ± {over_rows:.2f}{'**' * (who == best)}"
            for who, (_, mean, over_rows, _) in reached.items()
        }
        unit, ours = reached["divflow"][0], texts.pop("divflow")
        peers = ", ".join(f"{who} {numbers}" for who, numbers in texts.items())
        command = f"`experiment={name}`" + (" with `init_from`" if ROWS[name].start else "")
        error = next((quadrature(seeds) for seeds in models if seeds[0]["who"] == "divflow" and coarse(seeds)), None)
        beside = "" if error is None else f", quadrature error {shown(error)}"
        lines.append(f"| {ROWS[name].what} | {ours} {unit}{beside} | {peers} | {command} |")
    return "\n".join(lines)


def publish(found: Sequence[Result], out: Path, root: Path) -> None:
    """Write tables, figures and numbers to docs/, and the rows of `HEADLINES` to README.md, between the two marks of each page.

    Args:
        found: what was run.
        out: the folder of the runs, with the figure of all rows.
        root: that of the project.
    """
    docs = root / "docs"
    images = ["![Negative log-likelihood of every model on every row](results.png)"]
    shutil.copy(out / "results.png", docs)
    for name, row in ROWS.items():
        seeds = [result["seed"] for result in found if result["row"] == name]
        if row.figure and seeds:
            shutil.copy(out / name / str(seeds[0]) / "figures" / row.figure, docs / f"{name}.png")
            images.append(f"{row.what}, seed {seeds[0]}:\n\n![{row.what}]({name}.png)")
    (docs / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    _put(docs / "results.md", [short(found), markdown(found), *images])
    _put(root / "README.md", [short([result for result in found if result["row"] in HEADLINES])])


def _put(page: Path, parts: Sequence[str]) -> None:
    """Put parts between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page} must have the marks {BEGIN} and {END}, between which the table goes")
    page.write_text("\n\n".join([before + BEGIN, *parts, END + after]))

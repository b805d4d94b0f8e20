"""The table at the end of a run, and of an evaluation of a trained density."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["metrics_table", "print_results"]

_UNITS = {"nll": "nats", "gap": "nats", "bits_per_dim": "bits/dim", "loss": "up to a constant"}


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """Table of metrics with their standard errors, and of the evaluations of the field.

    Args:
        metrics: values by the names that the tasks log, without the stage: `nll`, `nll_standard_error`, ...
        title: title of the table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("unit")
    rows = {
        "negative log-likelihood": ("nll", "nats"),
        "gap to the truth": ("gap", "nats"),
        "discrete data": ("bits_per_dim", "bits/dim"),
        "discrete data, importance-weighted": ("bits_per_dim_importance_weighted", "bits/dim"),
        "objective": ("loss", "up to a constant"),
        "Fisher divergence": ("fisher_divergence", "units of 1/x²"),
    }
    for name_shown, (name, unit) in rows.items():
        if name in metrics:
            error = metrics[f"{name}_standard_error"]
            shown = "" if math.isnan(error) else f" ± {error:.4f}"  # one row has none
            table.add_row(name_shown, f"{metrics[name]:.4f}{shown}", unit)
            for part, kind in {"its probes": "estimator", "the dequantization": "dequantization"}.items():
                if metrics.get(f"{name}_{kind}_error"):
                    table.add_row(f"  of that ±, by {part}", f"{metrics[f'{name}_{kind}_error']:.1e}", unit)
            off = metrics.get("quadrature_error" if name == "nll" else f"{name}_quadrature_error")
            if off:
                table.add_row("  beside that ±, quadrature error", f"{off:.1e}", unit)
    _add_weighted(table, metrics)
    errors = {
        "estimator error": "estimator_error",
        "dequantization error": "dequantization_error",
    }
    for name_shown, name in errors.items():
        if metrics.get(name):
            table.add_row(name_shown, f"{metrics[name]:.1e}", "nats per sample")
    if "nfe" in metrics:
        table.add_row(
            "field evaluations", f"{metrics['nfe']:.0f} + {metrics['nfe_divergence']:.0f}", "solve + divergence"
        )
    return table


def _add_weighted(table: Table, metrics: Mapping[str, float]) -> None:
    """Add the estimates of weighted samples, if there are any."""
    if "effective_sample_fraction" in metrics:
        table.add_row("effective sample size", f"{100 * metrics['effective_sample_fraction']:.1f}", "% of the samples")
    for name_shown, name, unit in (
        ("log Z", "log_normalizer", "nats"),
        ("free energy, outer - inner well", "free_energy_difference", "kT"),
    ):
        if name in metrics:
            error, known = metrics[f"{name}_standard_error"], metrics.get(f"{name}_reference")
            table.add_row(name_shown, f"{metrics[name]:.4f} ± {error:.4f}", unit)
            if known is not None:
                table.add_row("  known to be", f"{known:.4f}", unit)


def _add_both_weights(table: Table, results: Mapping[str, float]) -> None:
    """Add the validation values of averaged and current weights, if training averaged them."""
    for name, current in results.items():
        monitor = name.removesuffix("_current_weights")
        if monitor != name:
            unit = _UNITS.get(monitor.rpartition("/")[2], "")
            table.add_row("validation, averaged weights", f"{results[monitor]:.4f}", unit)
            table.add_row("validation, current weights", f"{current:.4f}", unit)


def print_results(
    results: Mapping[str, float], seconds: float, steps: int, output: Path, tested: str, before: int = 0
) -> None:
    """Print the test metrics, the time, and the files that the run left.

    Args:
        results: metrics by the names that the tasks log.
        seconds: duration of training.
        steps: steps of the optimizer.
        output: the run's folder.
        tested: description of the weights that were tested.
        before: step that a resumed run went on from.
    """
    metrics = {name.removeprefix("test/"): value for name, value in results.items() if name.startswith("test/")}
    table = metrics_table(metrics, f"Test of {tested}")
    _add_both_weights(table, results)
    table.add_row(
        "training",
        f"{seconds:.0f}",
        f"seconds, {steps - before} of {steps} steps" if before else f"seconds, {steps} steps",
    )
    console = Console()
    console.print(table)
    names = ("config.yaml", "metrics.csv", "results.json", "checkpoints", "figures", "samples.npy")
    left = [name for name in names if (output / name).exists()]
    console.print(f"In {output}: {', '.join(left)}", soft_wrap=True, highlight=False)

"""The table that a run ends with."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["print_results"]


def print_results(results: Mapping[str, float], seconds: float, steps: int, output: Path) -> None:
    """Print the test metrics with their standard errors, the evaluations and the time.

    Args:
        results: test metrics by the names that the tasks log.
        seconds: of training.
        steps: of the optimizer.
        output: the run's folder.
    """
    table = Table(title="Test", title_justify="left")
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
    for title, (name, unit) in rows.items():
        if f"test/{name}" in results:
            error = results[f"test/{name}_standard_error"]
            table.add_row(title, f"{results[f'test/{name}']:.4f} ± {error:.4f}", unit)
            for part, kind in {"its probes": "estimator", "the dequantization": "dequantization"}.items():
                if results.get(f"test/{name}_{kind}_error"):
                    table.add_row(f"  of that ±, by {part}", f"{results[f'test/{name}_{kind}_error']:.1e}", unit)
    errors = {
        "quadrature error": "quadrature_error",
        "estimator error": "estimator_error",
        "dequantization error": "dequantization_error",
    }
    for title, name in errors.items():
        if results.get(f"test/{name}"):
            table.add_row(title, f"{results[f'test/{name}']:.1e}", "nats per sample")
    if "test/nfe" in results:
        counts = f"{results['test/nfe']:.0f} + {results['test/nfe_divergence']:.0f}"
        table.add_row("field evaluations", counts, "solve + divergence")
    table.add_row("training", f"{seconds:.0f}", f"seconds, {steps} steps")
    console = Console()
    console.print(table)
    console.print(
        f"In {output}: config.yaml, metrics.csv, checkpoints, figures, samples.npy", soft_wrap=True, highlight=False
    )

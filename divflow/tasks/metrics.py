"""Means with standard errors, over all batches and processes, and the values that are reported from them."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Average", "MeanWithStandardError", "QuadratureWarning", "summarized", "warn_of_quadrature"]


# The last digit of reported results; equal rows have no spread.
_SHOWN = 1e-4


class QuadratureWarning(UserWarning):
    """A likelihood is less certain than its standard error states, since its trajectory or integral is too coarse."""


class Average(NamedTuple):
    """A mean and its errors.

    Attributes:
        mean: m = sum_i w_i x_i / sum_i w_i.
        standard_error: of m, from the spread of the values; NaN for fewer than two.
        root: sqrt(sum_i w_i^2 x_i) / sum_i w_i. If the x_i are variances of other values, this is the error that they leave in the
            mean of those.
    """

    mean: Tensor
    standard_error: Tensor
    root: Tensor


class MeanWithStandardError(Metric):
    """Mean of all values, weighted or not, with the standard error of that mean.

        m = sum_i w_i x_i / sum_i w_i      s = sqrt(n / (n - 1) * sum_i w_i^2 (x_i - m)^2) / sum_i w_i

    by the delta method, n being the number of values of positive weight. For equal weights s is the standard deviation over
    sqrt(n). Only ratios of weights matter. Sums are kept in float64 and added over processes.

    Args:
        shared: True if each process gets its own values, False if each gets all of them.
    """

    full_state_update = False
    count: Tensor
    weight: Tensor
    total: Tensor
    # Sums of squared weights, alone and times values and their squares.
    weight_2: Tensor
    total_2: Tensor
    squares_2: Tensor

    def __init__(self, *, shared: bool = True) -> None:
        super().__init__(sync_on_compute=shared)
        for name in ("count", "weight", "total", "weight_2", "total_2", "squares_2"):
            self.add_state(name, torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: Tensor | None = None) -> None:
        """Add values of any shape, with weights of the same shape if there are any."""
        values = values.detach().double()
        weight = torch.ones_like(values) if weight is None else weight.detach().to(values)
        self.count += weight.count_nonzero()
        self.weight += weight.sum()
        self.weight_2 += weight.square().sum()
        self.total += (weight * values).sum()
        self.total_2 += (weight.square() * values).sum()
        self.squares_2 += (weight * values).square().sum()

    def compute(self) -> Average:
        """The mean and its errors."""
        mean = self.total / self.weight
        spread = (self.squares_2 - 2 * mean * self.total_2 + mean.square() * self.weight_2).clamp_min(0)
        error = (spread * self.count / (self.count - 1)).sqrt() / self.weight
        return Average(mean.float(), error.float(), (self.total_2.clamp_min(0).sqrt() / self.weight).float())


def summarized(averages: Mapping[str, MeanWithStandardError], unit: float | None, *, errors: bool) -> dict[str, Tensor]:
    """Reported values: means by name and, with `errors`, their standard errors.

    A mean is off by at most the mean of the quadrature errors, which is reported in its units, too. The variances
    `estimator_variance` (probes) and `dequantization_variance` (noise) of single samples give two values each:

    - `*_error` is the root mean square of one sample's error;
    - `nll_*_error`, and so on, is the error that remains in a mean.

    Args:
        averages: averages by the names of `likelihood_values` and of the tasks.
        unit: nats of one bit per dimension, for discrete data.
        errors: report the standard errors, too.

    Returns:
        Values by the names under which they are logged, without the stage.
    """
    found: dict[str, Tensor] = {}
    for name, metric in averages.items():
        mean, error, of_mean = metric.compute()
        if not name.endswith("_variance"):
            found[name] = mean
            if errors and name == "quadrature_error":
                found |= {} if unit is None else {"bits_per_dim_quadrature_error": mean / unit}
            elif errors and not name.startswith("nfe"):
                found[f"{name}_standard_error"] = error
            continue
        part, variance = name.removesuffix("_variance"), mean.clamp_min(0)
        found[f"{part}_error"] = variance.sqrt()
        if errors and part == "estimator":
            found["nll_estimator_error"] = of_mean
        if errors and unit is not None:
            found[f"bits_per_dim_{part}_error"] = of_mean / unit
    return found


def warn_of_quadrature(results: Mapping[str, Tensor], remedy: str) -> None:
    """Warn if the quadrature error of a result exceeds the standard error beside it.

    Args:
        results: reported values by name.
        remedy: settings that reduce the quadrature error, for the message.
    """
    for name, unit in (("bits_per_dim", "bits/dim"), ("nll", "nats"), ("gap", "nats")):
        error = results.get("bits_per_dim_quadrature_error" if name == "bits_per_dim" else "quadrature_error")
        spread = results.get(f"{name}_standard_error")
        if error is None or spread is None or not error > spread or error < _SHOWN:  # of one row the spread is NaN
            continue
        warnings.warn(
            f"{name}, {float(results[name]):.4f} ± {float(spread):.4f} {unit}, may be off by another {float(error):.2g} {unit}: the "
            f"estimated error of the trajectories and of the integrals along them, which the ± does not include. Use {remedy}",
            QuadratureWarning,
            stacklevel=3,
        )
        return

"""Means with their standard errors, over all batches and processes, and what is reported of them."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Average", "MeanWithStandardError", "QuadratureWarning", "summarized", "warn_of_quadrature"]


# The last digit in which results are shown: rows that are all alike have no spread.
_SHOWN = 1e-4


class QuadratureWarning(UserWarning):
    """A likelihood is known to less than its standard error says: the trajectory or the integral along it was too coarse."""


class Average(NamedTuple):
    """A mean, and its errors.

    Attributes:
        mean: m = sum_i w_i x_i / sum_i w_i.
        standard_error: of m, by the spread of the values; NaN for fewer than two.
        root: sqrt(sum_i w_i^2 x_i) / sum_i w_i: where the values are the variances of others, the error that these leave in
            their mean.
    """

    mean: Tensor
    standard_error: Tensor
    root: Tensor


class MeanWithStandardError(Metric):
    """The mean of all values, weighted or not, and the standard error of that mean.

        m = sum_i w_i x_i / sum_i w_i      s = sqrt(n / (n - 1) * sum_i w_i^2 (x_i - m)^2) / sum_i w_i

    by the delta method, n being the number of values of positive weight; of equal weights s is the standard deviation over
    sqrt(n). Weights are known, as those of a survey or of importance: their size does not matter.

    Sums are kept in float64, and added over processes.

    Args:
        shared: whether each process is given values of its own, and not all of them.
    """

    full_state_update = False
    count: Tensor
    weight: Tensor
    total: Tensor
    # Of the squares of weights, alone and with values and their squares.
    weight_2: Tensor
    total_2: Tensor
    squares_2: Tensor

    def __init__(self, *, shared: bool = True) -> None:
        super().__init__(sync_on_compute=shared)
        for name in ("count", "weight", "total", "weight_2", "total_2", "squares_2"):
            self.add_state(name, torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: Tensor | None = None) -> None:
        """Add values of any shape; with weights, of theirs."""
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
    """What is reported of values per sample: means, and with `errors` their standard errors, by name.

    A mean of samples is off by the mean of their quadrature errors at most, which is reported in its units, too.

    What the errors of single samples leave of error in a mean is that of `name_variance`, for its probes
    (`estimator_variance`) and its noise (`dequantization_variance`): the root mean square of one sample's is `name_error`.

    Args:
        averages: by the names that tasks judge by.
        unit: nats of one bit per dimension, for discrete data.
        errors: report the standard errors, too.
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
    """Warn where a result's quadrature error is more than the standard error beside it.

    Args:
        results: what is reported, by name.
        remedy: settings that make it smaller.
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

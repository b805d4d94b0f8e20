"""Means with their standard errors, over all batches and processes, and what is reported of them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanWithStandardError", "summarized"]


class MeanWithStandardError(Metric):
    """The mean of all values and s / sqrt(n), the standard error of that mean.

    Counts, sums and sums of squares are kept in float64, and added over processes.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        values = values.detach().double()
        self.count += values.numel()
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean, and its standard error (NaN for fewer than two values)."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0) * self.count / (self.count - 1)
        return mean.float(), (variance / self.count).sqrt().float()


def summarized(averages: Mapping[str, MeanWithStandardError], unit: float | None, *, errors: bool) -> dict[str, Tensor]:
    """What is reported of values per sample: means, and with `errors` their standard errors, by name.

    What the errors of single samples leave of error in a mean is that of `name_variance`, for its probes
    (`estimator_variance`) and its noise (`dequantization_variance`): the root mean square of one sample's is `name_error`.

    Args:
        averages: by the names that tasks judge by.
        unit: nats of one bit per dimension, for discrete data.
        errors: report the standard errors, too.
    """
    found: dict[str, Tensor] = {}
    for name, metric in averages.items():
        mean, error = metric.compute()
        if not name.endswith("_variance"):
            found[name] = mean
            if errors and not name.startswith("nfe") and name != "quadrature_error":
                found[f"{name}_standard_error"] = error
            continue
        part, variance = name.removesuffix("_variance"), mean.clamp_min(0)
        found[f"{part}_error"] = variance.sqrt()
        of_mean = (variance / metric.count).sqrt().to(variance)
        if errors and part == "estimator":
            found["nll_estimator_error"] = of_mean
        if errors and unit is not None:
            found[f"bits_per_dim_{part}_error"] = of_mean / unit
    return found

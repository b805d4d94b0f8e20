"""A mean with its standard error, over all batches and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanWithStandardError"]


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
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

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

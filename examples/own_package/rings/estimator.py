"""An estimator that looks at a few coordinates of the Jacobian's diagonal."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.divergence import Estimate, Estimator, Field
from divflow.operators.linearization import linearize_field

__all__ = ["Coordinates"]


@dataclass(frozen=True)
class Coordinates(Estimator):
    """The mean of D J_ii over `count` coordinates i, drawn independently for each sample; unbiased.

    Args:
        count: vector-Jacobian products a call.
    """

    count: int = 1
    stochastic = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, but is {self.count}")

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Draw coordinates, and estimate."""
        return self.freeze(x, generator).estimate(g, t, x)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> "FixedCoordinates":
        """Draw the coordinates once, for batches of x's shape: solvers need a field that stays the same."""
        size = x[0].numel()
        drawn = torch.randint(size, (self.count, len(x)), generator=generator, device=x.device)
        return FixedCoordinates(torch.nn.functional.one_hot(drawn, size).to(x).view(self.count, *x.shape))


@dataclass(frozen=True, eq=False)
class FixedCoordinates(Estimator):
    """The same with given coordinates, as unit vectors `(count, k, *event)`."""

    units: Tensor
    frozen = True

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the estimate, and the standard error of the mean over the coordinates."""
        field = linearize_field(g, t, x)  # evaluates the field once
        entries = (field.pullback(self.units) * self.units).flatten(2).sum(dim=2)
        samples = entries * x[0].numel()
        count = len(samples)
        error = samples.detach().std(dim=0) / count**0.5 if count > 1 else None
        return Estimate(field.value, samples.mean(dim=0), error, samples)

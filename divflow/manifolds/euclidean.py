"""Euclidean space, as a part of products."""

import math

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal

from divflow.errors import check_count
from divflow.manifolds.flat import Flat
from divflow.manifolds.manifold import ManifoldError

__all__ = ["Euclidean"]


class Euclidean(Flat):
    """R^n, vectors of n entries.

    Args:
        n: dimension, at least 1.
    """

    def __init__(self, n: int) -> None:
        check_count("n", n)
        self.n = self.dim = n
        self.event_shape = Size([n])

    def __repr__(self) -> str:
        return f"Euclidean({self.dim})"

    def project(self, x: Tensor) -> Tensor:
        """The point itself."""
        return x

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The sum x + u."""
        return x + u

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The difference y - x."""
        return y - x

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """|y - x|; at y = x it has no derivative, and autograd returns zero."""
        return torch.linalg.vector_norm(y - x, dim=-1)

    def geodesic(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The straight line."""
        return torch.lerp(x, y, self._spread(t)), y - x

    @property
    def volume(self) -> float:
        """Infinite."""
        return math.inf

    def uniform(self, dtype: torch.dtype | None = None) -> Distribution:
        """Refused: the volume is infinite."""
        raise ManifoldError(
            f"{self} has no uniform density, since its volume is infinite; use wrapped_normal(mean, std), a normal one"
        )

    def base(self, dtype: torch.dtype | None = None) -> Distribution:
        """The standard normal density."""
        return self.wrapped_normal(torch.zeros(self.dim, dtype=dtype), 1.0)

    def wrapped_normal(self, mean: Tensor, std: Tensor | float) -> Distribution:
        """The normal density; nothing is wrapped."""
        scale = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
        return Independent(Normal(mean, scale[..., None].expand_as(mean)), 1)

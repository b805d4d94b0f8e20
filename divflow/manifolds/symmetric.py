"""Manifolds whose uniform and wrapped normal densities are known."""

from abc import abstractmethod

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from divflow.manifolds.densities import Uniform, WrappedNormal
from divflow.manifolds.manifold import Manifold

__all__ = ["Symmetric"]


class Symmetric(Manifold):
    """A manifold that looks the same from each of its points, of finite volume: tori, spheres and rotations."""

    def uniform(self, dtype: torch.dtype | None = None) -> Distribution:
        """The density 1 / volume."""
        return Uniform(self, dtype)

    def wrapped_normal(self, mean: Tensor, std: Tensor | float) -> Distribution:
        """The density of exp(mean, v), v ~ N(0, std^2) in the tangent space; `log_wrapped_normal` has the formula."""
        return WrappedNormal(self, mean, std)

    @abstractmethod
    def draw_uniform(self, shape: Size, like: Tensor) -> Tensor:
        """Independent uniform points `(*shape, *event_shape)` of the dtype and device of a tensor."""

    @abstractmethod
    def draw_tangent(self, x: Tensor) -> Tensor:
        """Standard normal tangent vectors at x."""

    @abstractmethod
    def log_wrapped_normal(self, mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
        """The log-density of the wrapped normal at x in nats, `(*batch,)`."""

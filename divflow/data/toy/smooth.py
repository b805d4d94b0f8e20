"""Densities that are differentiable everywhere, and so have a score."""

from abc import ABC, abstractmethod

from torch import Generator, Tensor

from divflow.operators import gradient

__all__ = ["SmoothDensity"]


class SmoothDensity(ABC):
    """Base of densities in the plane that are differentiable and positive everywhere."""

    @abstractmethod
    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, 2)`."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, 2)` in nats, `(k,)`."""

    def score(self, x: Tensor) -> Tensor:
        """The score grad log p(x) of x `(k, 2)`, `(k, 2)`, by autograd in float64."""
        return gradient(self.log_prob, x.double()).to(x.dtype)

"""Angles: the torus, any period."""

import math

import torch
from torch import Size, Tensor

from divflow.errors import check_count, check_positive
from divflow.manifolds.densities import windings
from divflow.manifolds.flat import Flat
from divflow.manifolds.symmetric import Symmetric

__all__ = ["Torus"]


class Torus(Flat, Symmetric):
    """n angles, each of which is the same point after a period.

    A point is any n numbers: x and x + period are one. `project` takes them to [-period / 2, period / 2).

    Args:
        n: number of angles, at least 1.
        period: of each angle: 2 pi for radians, 360 for degrees.

    Example:
        >>> Torus(2, period=360).distance(torch.tensor([179.0, 0.0]), torch.tensor([-179.0, 0.0]))
        tensor(2.)
    """

    def __init__(self, n: int, period: float = 2 * math.pi) -> None:
        check_count("n", n)
        check_positive("period", period)
        self.n = self.dim = n
        self.event_shape, self.period = Size([n]), float(period)

    def __repr__(self) -> str:
        return f"Torus({self.dim}, period={self.period:.6g})"

    def project(self, x: Tensor) -> Tensor:
        """The same point, its angles from -period / 2 to period / 2."""
        return x - self.period * torch.floor(x.detach() / self.period + 0.5)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The sum x + u, as `project` gives it."""
        return self.project(x + u)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The difference y - x by the shorter way round; of two that are as long, the negative one."""
        return self.project(y - x)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The norm of `log(x, y)`; at zero and at half a period it has no derivative."""
        return torch.linalg.vector_norm(self.log(x, y), dim=-1)

    def geodesic(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Round the shorter way, as `log` chooses it."""
        u = self.log(x, y)
        return self.exp(x, self._spread(t) * u), u

    @property
    def volume(self) -> float:
        """period^n."""
        return self.period**self.dim

    def off(self, x: Tensor) -> Tensor:
        """Zero: any numbers are angles."""
        return torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)

    def again(self, x: Tensor) -> Tensor:
        """The angles a period later."""
        return x + self.period

    def draw_uniform(self, shape: Size, like: Tensor) -> Tensor:
        """Independent uniform points."""
        return self.period * (torch.rand(shape + self.event_shape, dtype=like.dtype, device=like.device) - 0.5)

    def draw_tangent(self, x: Tensor) -> Tensor:
        """Standard normal tangent vectors at x."""
        return torch.randn_like(x)

    def log_wrapped_normal(self, mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
        """Independent wrapped normal angles.

        p(x) = prod_i sum_k N(x_i - mean_i + k period; 0, std^2).
        """
        turns = windings(std / self.period * 2 * math.pi, x)
        lengths = self.log(mean, x)[..., None] + self.period * turns
        normal = -lengths.square() / (2 * std[..., None, None] ** 2)
        return torch.logsumexp(normal, dim=-1).sum(dim=-1) - self.dim * (std.log() + math.log(2 * math.pi) / 2)

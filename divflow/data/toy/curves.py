"""Densities of points on curves with Gaussian noise: moons, circles, spirals, the Swiss roll."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from divflow.data.toy.smooth import SmoothDensity

__all__ = ["CurveDensity", "circles", "swiss_roll", "two_moons", "two_spirals"]

Curve = Callable[[Tensor], Tensor]


class CurveDensity(SmoothDensity):
    """Density of points c(u) + noise * n on a random curve c, with u uniform on [0, 1] and n standard normal.

        p(x) = mean over curves of integral from 0 to 1 of N(x; c(u), noise^2 I) du

    The integral is a Gauss-Legendre quadrature with nodes closer than noise / 2. It is exact to about 1e-12, because the integrand is
    analytic, of width noise.

    Args:
        curves: functions of u `(n,)` that return points `(n, 2)`.
        noise: standard deviation of the noise.
        scale: factor of the points, noise included.
        quadrature_nodes: nodes per curve.
    """

    def __init__(self, curves: Sequence[Curve], noise: float, scale: float = 1.0, quadrature_nodes: int = 512) -> None:
        if not noise > 0:
            raise ValueError(f"noise must be positive, since a curve has no density in the plane, but is {noise!r}")
        self._curves, self.noise, self.scale = tuple(curves), noise, scale
        nodes, weights = np.polynomial.legendre.leggauss(quadrature_nodes)
        u = torch.as_tensor((nodes + 1) / 2, device="cpu")
        self._centres = torch.cat([curve(u) for curve in self._curves])
        self._log_weights = torch.as_tensor(np.log(weights / 2 / len(self._curves)), device="cpu").repeat(
            len(self._curves)
        )

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, 2)`."""
        u = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        which = torch.randint(len(self._curves), (count,), generator=generator, device="cpu")
        points = torch.stack([curve(u) for curve in self._curves])[which, torch.arange(count, device="cpu")]
        points = points + self.noise * torch.randn(points.shape, generator=generator, dtype=torch.float64, device="cpu")
        return (points * self.scale).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, 2)` in nats, `(k,)`."""
        points = x.double() / self.scale
        centres, log_weights = self._centres.to(x.device), self._log_weights.to(x.device)
        parts = []
        for chunk in points.split(4096):
            exponent = -torch.cdist(chunk, centres).square() / (2 * self.noise**2)
            parts.append(torch.logsumexp(exponent + log_weights, dim=1))
        log_normalizer = math.log(2 * math.pi * (self.noise * self.scale) ** 2)
        return (torch.cat(parts) - log_normalizer).to(x.dtype)


def two_moons(noise: float = 0.1) -> CurveDensity:
    """Two interleaved half circles of radius 1, as scikit-learn's `make_moons`, centred.

    Args:
        noise: standard deviation of the Gaussian noise around the curve.
    """

    def upper(u: Tensor) -> Tensor:
        return torch.stack([torch.cos(math.pi * u) - 0.5, torch.sin(math.pi * u) - 0.25], dim=1)

    def lower(u: Tensor) -> Tensor:
        return torch.stack([0.5 - torch.cos(math.pi * u), 0.25 - torch.sin(math.pi * u)], dim=1)

    return CurveDensity([upper, lower], noise)


def circles(noise: float = 0.1) -> CurveDensity:
    """Two concentric circles of radius 1 and 2.

    Args:
        noise: standard deviation of the Gaussian noise around the curve.
    """

    def circle(radius: float) -> Curve:
        return lambda u: radius * torch.stack([torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u)], dim=1)

    return CurveDensity([circle(1.0), circle(2.0)], noise)


def two_spirals(noise: float = 0.1) -> CurveDensity:
    """Two arms of a spiral of one and a half turns, with radius up to 3; sparser outside, as FFJORD's.

    Args:
        noise: standard deviation of the Gaussian noise around the curve.
    """

    def arm(sign: float) -> Curve:
        def point(u: Tensor) -> Tensor:
            angle = 3 * math.pi * u.sqrt()
            return sign * torch.stack([-torch.cos(angle), torch.sin(angle)], dim=1) * angle[:, None] / math.pi

        return point

    return CurveDensity([arm(1.0), arm(-1.0)], noise, quadrature_nodes=1024)


def swiss_roll(noise: float = 0.1) -> CurveDensity:
    """The plane section of scikit-learn's `make_swiss_roll`, an arm of one and a half turns, with radius up to 3.

    Args:
        noise: standard deviation of the Gaussian noise around the curve.
    """

    def roll(u: Tensor) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * u)
        return torch.stack([torch.cos(angle), torch.sin(angle)], dim=1) * angle[:, None] / (1.5 * math.pi)

    return CurveDensity([roll], noise)

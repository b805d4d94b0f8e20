"""Paths from noise to data, whose velocities a flow learns."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from divflow.distributions.noise import normal_like
from divflow.errors import check_numbers, on_copies
from divflow.score.sde import broadcast

__all__ = ["AffinePath", "LinearPath", "Path", "PathPoint", "TrigonometricPath", "VariancePreservingPath"]


class PathPoint(NamedTuple):
    """A point of a path and the velocity there.

    Attributes:
        x: x_t, `(k, *event)`.
        velocity: dx_t/dt with both ends held fixed, `(k, *event)`.
    """

    x: Tensor
    velocity: Tensor


class PathCoefficients(NamedTuple):
    """The coefficients alpha and sigma of a path, and their derivatives in time, all of t's shape."""

    alpha: Tensor
    sigma: Tensor
    alpha_slope: Tensor
    sigma_slope: Tensor


class Path(ABC):
    """Base class of the paths from noise x_0 at t = 0 to a datum x_1 at t = 1.

    The mean of dx_t/dt over the paths through a point is the velocity of a flow whose density at each t is that of x_t.

    Your own path is a frozen dataclass that implements `__call__`; one that is linear in both ends derives from `AffinePath`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Protect the caller's tensors from a path that writes to them."""
        super().__init_subclass__(**options)
        on_copies(cls, "__call__", "coefficients")

    @abstractmethod
    def __call__(self, t: Tensor, noise: Tensor, data: Tensor) -> PathPoint:
        """Compute the point at time t, and the velocity there.

        Args:
            t: in [0, 1], a scalar or one per sample, `(k,)`.
            noise: x_0, `(k, *event)`.
            data: x_1, `(k, *event)`.
        """

    def noise(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw the noise that the objective takes if it is given none: standard normal.

        Args:
            x: data `(k, *event)`, whose shape, dtype and device the noise has.
            generator: torch's default one if None.
        """
        return normal_like(x, generator)


class AffinePath(Path):
    """Base class of the paths that are linear in noise and datum.

        x_t = alpha(t) x_1 + sigma(t) x_0,   dx_t/dt = alpha'(t) x_1 + sigma'(t) x_0

    (Albergo & Vanden-Eijnden 2023, arXiv:2209.15571). Your own one is a frozen dataclass that implements `coefficients`.
    """

    @abstractmethod
    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Return alpha, sigma and their derivatives at times in [0, 1], `()` or `(k,)`; all finite."""

    def __call__(self, t: Tensor, noise: Tensor, data: Tensor) -> PathPoint:
        """Compute the point and the velocity, as `Path`."""
        alpha, sigma, alpha_slope, sigma_slope = (broadcast(value, data) for value in self.coefficients(t))
        return PathPoint(alpha * data + sigma * noise, alpha_slope * data + sigma_slope * noise)


@dataclass(frozen=True)
class LinearPath(AffinePath):
    """Straight lines from noise to data, at constant velocity.

        x_t = t x_1 + (1 - (1 - sigma_min) t) x_0,    dx_t/dt = x_1 - (1 - sigma_min) x_0

    Lipman et al. (2023, arXiv:2210.02747, equations 20 to 23); without sigma_min the rectified flow of Liu et al. (2023,
    arXiv:2209.03003) and, with a coupling of choice, the conditional flow matching of Tong et al. (2024, arXiv:2302.00482).

    Args:
        sigma_min: the remaining noise at t = 1: the flow then models x_1 + sigma_min x_0. Zero models the data themselves; a
            little keeps the velocity smooth if data lie on a surface or are few.

    Raises:
        ValueError: sigma_min outside [0, 1).

    Example:
        >>> import torch
        >>> point = LinearPath()(torch.tensor(0.25), torch.zeros(1, 2), torch.ones(1, 2))
        >>> point.x, point.velocity
        (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(sigma_min=self.sigma_min)
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), but is {self.sigma_min!r}; 0 leaves no noise in the data")

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Return t, 1 - (1 - sigma_min) t, 1 and sigma_min - 1."""
        slope = self.sigma_min - 1
        return PathCoefficients(t, 1 + slope * t, torch.ones_like(t), torch.full_like(t, slope))


@dataclass(frozen=True)
class TrigonometricPath(AffinePath):
    """Arcs from noise to data that keep the size of x_t (Albergo & Vanden-Eijnden 2023, arXiv:2209.15571).

        x_t = sin(pi t / 2) x_1 + cos(pi t / 2) x_0

    alpha^2 + sigma^2 = 1, so x_t is as large as its independent ends if these have one size.
    """

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Return sine and cosine of pi t / 2, and their derivatives."""
        sine, cosine = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
        return PathCoefficients(sine, cosine, math.pi / 2 * cosine, -math.pi / 2 * sine)


@dataclass(frozen=True)
class VariancePreservingPath(AffinePath):
    """The paths of diffusion models, alpha^2 + sigma^2 = 1 (Lipman et al. 2023, arXiv:2210.02747, equations 18 and 19).

        alpha = exp(-B(s) / 2),   sigma = sqrt(1 - exp(-B(s))),   B(s) = beta_min s + (beta_max - beta_min) s^2 / 2

    with diffusion time s = 1 - (1 - epsilon) t, which falls from 1 to epsilon.

    - At s = 0 itself sigma has no slope, and the mean of the squared velocity over t would be infinite. So a little noise
      remains at t = 1, sigma(epsilon), 0.010 at the defaults.
    - A little of the data is present at t = 0, alpha(1) = 0.0066, which flows from a standard normal leave out.
    - Data should have a standard deviation of about 1.
    - Velocities change fast near t = 1: a flow on this path takes more evaluations than on a straight one.

    Args:
        beta_min: rate of noise at s = 0.
        beta_max: rate of noise at s = 1.
        epsilon: diffusion time of the data.

    Raises:
        ValueError: not 0 < beta_min < beta_max, or epsilon outside (0, 1).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        check_numbers(beta_min=self.beta_min, beta_max=self.beta_max, epsilon=self.epsilon)
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(f"need 0 < beta_min < beta_max, but got {self.beta_min!r} and {self.beta_max!r}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must lie in (0, 1), but is {self.epsilon!r}: at 0 the velocity is infinite")

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Return the formulas of the class; dB/dt = -(1 - epsilon) beta, alpha' = -alpha B' / 2, sigma' = alpha^2 B' / (2 sigma)."""
        speed = 1 - self.epsilon
        s = 1 - speed * t
        slope = self.beta_max - self.beta_min
        integral, rate = self.beta_min * s + slope / 2 * s**2, -speed * (self.beta_min + slope * s)
        alpha, sigma = torch.exp(-integral / 2), (-torch.expm1(-integral)).sqrt()
        return PathCoefficients(alpha, sigma, -alpha * rate / 2, alpha.square() * rate / (2 * sigma))

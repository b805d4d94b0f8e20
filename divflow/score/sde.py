"""Linear stochastic differential equations that carry data to noise, and the Gaussian kernels that solve them."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from divflow.distributions.noise import normal_like
from divflow.errors import check_numbers, checked_event_shape, on_copies
from divflow.manifolds import Manifold
from divflow.operators.field import as_time, checked_state
from divflow.operators.transformed import forward_mode
from divflow.score.prior import Prior, SDEError

__all__ = [
    "SDE",
    "Marginal",
    "Prior",
    "SDEError",
    "SubVariancePreserving",
    "VarianceExploding",
    "VariancePreserving",
    "broadcast",
]


class Marginal(NamedTuple):
    """The distribution of x_t given x_0: normal with mean `mean_scale * x_0` and standard deviation `std`.

    Attributes:
        mean_scale: alpha(t), of t's shape.
        std: sigma(t), of t's shape.
    """

    mean_scale: Tensor
    std: Tensor


class Coefficients(NamedTuple):
    """f(t) and g(t)^2 of dx = f x dt + g dw; both of t's shape."""

    drift: Tensor
    squared_diffusion: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SDE(ABC):
    """Base class of the linear SDEs that carry data at t = 0 to noise at t = T (Song et al. 2021, arXiv:2011.13456).

        dx = f(t) x dt + g(t) dw,    x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I)

    Your own SDE (a frozen dataclass, if it has settings) implements two methods: `mean_scale(t)`, which is alpha, and
    `std(t)`, which is sigma. Both are functions of a tensor of times that torch can differentiate, with alpha(0) = 1 and
    sigma(0) = 0. The rest follows:

        f = d log alpha / dt,   g^2 = d sigma^2 / dt - 2 f sigma^2

    Everything is elementwise in x, so an event may have any shape; only the prior needs to know it.

    Args:
        event_shape: shape of one sample, for the prior; an int for vectors, None if no prior is needed.
        T: the time of the noise.
        epsilon: the earliest time at which scores are learnt, and at which samplers and likelihoods stop, because the
            kernel's own score, -noise / sigma(t), has no limit at t = 0. Their result is the density at epsilon, that of
            alpha(epsilon) x_0 + sigma(epsilon) noise.

    Raises:
        SDEError: epsilon outside (0, T).
        ValueError: an invalid event shape.

    Example:
        >>> class Linear(SDE):  # Brownian motion
        ...     def mean_scale(self, t):
        ...         return torch.ones_like(t)
        ...     def std(self, t):
        ...         return t.sqrt()
        >>> Linear(epsilon=1e-3).diffusion(torch.tensor([0.3, 0.6]))
        tensor([1., 1.])
    """

    event_shape: tuple[int, ...] | None = None
    T: float = 1.0
    epsilon: float = 1e-5
    manifold: Manifold | None = field(default=None, init=False, repr=False)

    def __init_subclass__(cls, **options: Any) -> None:
        """Protect the caller's times from an SDE that writes to them."""
        super().__init_subclass__(**options)
        on_copies(cls, "mean_scale", "std")

    def __post_init__(self) -> None:
        if self.event_shape is not None:
            object.__setattr__(self, "event_shape", checked_event_shape(self.event_shape))
        check_numbers(epsilon=self.epsilon, T=self.T)
        if not 0 < self.epsilon < self.T < math.inf:
            raise SDEError(f"epsilon must lie in (0, T), T = {self.T!r}, but is {self.epsilon!r}")

    @abstractmethod
    def mean_scale(self, t: Tensor) -> Tensor:
        """Return alpha(t), of t's shape."""

    @abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """Return sigma(t), of t's shape."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return f(t) and g(t)^2, of t's shape, without checking that t is in [0, T]: solvers call this at every step."""
        # Forward mode takes no expanded tensors; at 0 a standard deviation such as sqrt(t) has no slope.
        t = t.contiguous().clamp_min(1e-30)
        ones = torch.ones_like(t)
        with forward_mode():
            alpha, alpha_slope = torch.func.jvp(self.mean_scale, (t,), (ones,))[:2]
            variance, variance_slope = torch.func.jvp(lambda s: self.std(s).square(), (t,), (ones,))[:2]
        drift = alpha_slope / alpha
        return Coefficients(drift.to(t.dtype), (variance_slope - 2 * drift * variance).to(t.dtype))

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return alpha(t) and sigma(t), of t's shape.

        Raises:
            SDEError: t outside [0, T].
        """
        t = self._checked_time(t)
        return Marginal(self.mean_scale(t), self.std(t))

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Compute f(t) x, `(k, *event)`; t is a scalar or one time per sample.

        Raises:
            FieldError: x is not a floating-point tensor with a batch dimension, or t has another shape.
            SDEError: t outside [0, T].
        """
        t = self._checked_time(as_time(t, checked_state(x)))
        return broadcast(self.coefficients(t).drift, x) * x

    def diffusion(self, t: Tensor | float) -> Tensor:
        """Compute g(t), of t's shape.

        Raises:
            SDEError: t outside [0, T].
        """
        return self.coefficients(self._checked_time(t)).squared_diffusion.sqrt()

    def check_score_time(self, t: Tensor) -> None:
        """Refuse a time at which no score can be learnt.

        Raises:
            SDEError: t outside (0, T].
        """
        if t.numel() and not bool(((t > 0) & (t <= self.T)).all()):
            raise SDEError(
                f"t must lie in (0, T], T = {self.T}, but reaches from {t.min().item():g} to {t.max().item():g}. "
                f"Start at epsilon = {self.epsilon}: at t = 0 the noise has no score."
            )

    def check(self) -> None:
        """Refuse functions that are not those of an SDE, tested on a grid of times.

        Raises:
            SDEError: alpha or sigma does not have t's shape, is not positive or not finite, or g^2 is negative.
        """
        t = torch.linspace(self.epsilon, self.T, 33, dtype=torch.float64, device="cpu")
        for name, values in {"mean_scale": self.mean_scale(t), "std": self.std(t)}.items():
            if not isinstance(values, Tensor) or values.shape != t.shape:
                raise SDEError(
                    f"{type(self).__name__}.{name}(t) must return a tensor of t's shape, but returned {values!r}"
                )
            if not bool(((values > 0) & values.isfinite()).all()):
                raise SDEError(
                    f"{type(self).__name__}.{name}(t) must be positive and finite on [epsilon, T], but reaches from "
                    f"{values.min().item():g} to {values.max().item():g}. End at an earlier T if it reaches 0."
                )
        squared = self.coefficients(t).squared_diffusion
        if not bool((squared >= -1e-9 * squared.abs().max()).all()):
            raise SDEError(
                f"the squared diffusion of {type(self).__name__} is {squared.min().item():g} at t = "
                f"{t[squared.argmin()].item():g}, where sigma(t) / alpha(t) falls. It must not decrease in time."
            )

    def diffuse(self, x: Tensor, t: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draw x_t given data x, and return it with the score of x_t given x, if that is known.

        Args:
            x: data `(k, *event)`.
            t: a scalar or one time per sample.
            generator: torch's default one if None.
        """
        noise, std = self.noise(x, generator), self.std(t)
        return self.perturb(x, t, noise), -noise / broadcast(std, x)

    def noise(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw standard normal noise at x, `(k, *event)`; torch's default generator if None."""
        return normal_like(x, generator)

    def moved(self, x: Tensor, vector: Tensor) -> Tensor:
        """Take a step of a sampler from x, x + vector."""
        return x + vector

    def perturb(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_t = alpha(t) x + sigma(t) noise; t is a scalar or one time per sample."""
        return broadcast(self.mean_scale(t), x) * x + broadcast(self.std(t), x) * noise

    @property
    def prior(self) -> Distribution:
        """Return the noise at T that replaces the data: N(0, sigma(T)^2 I) over events of `event_shape`.

        Raises:
            SDEError: the SDE has no event shape.
        """
        if self.event_shape is None:
            raise SDEError(
                f"{type(self).__name__} has no event shape, so it has no prior. "
                f"Build it as {type(self).__name__}(event_shape=(3, 32, 32)), with the shape of one sample."
            )
        return Prior(self.event_shape, self.std(torch.tensor(self.T, dtype=torch.float64, device="cpu")).item())

    def _checked_time(self, t: Tensor | float) -> Tensor:
        t = t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu")
        t = t if t.is_floating_point() else t.to(torch.get_default_dtype())
        if t.numel() and not bool(((t >= 0) & (t <= self.T)).all()):
            raise SDEError(
                f"t must lie in [0, T], T = {self.T}, but reaches from {t.min().item():g} to {t.max().item():g}"
            )
        return t


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values of t's shape, () or (k,), to multiply x, in x's dtype.

    Args:
        values: of t's shape.
        x: states `(k, *event)`.
    """
    return values.to(x.dtype).reshape(values.shape + (1,) * ((x.ndim - 1) * values.ndim))


@dataclass(frozen=True)
class VarianceExploding(SDE):
    """Add noise without shrinking the data.

        alpha = 1,   sigma(t)^2 = sigma_min^2 (r^(2 t / T) - 1),   r = sigma_max / sigma_min

    This is the equation's own variance. The commonly quoted sigma_min r^(t / T) includes sigma_min^2 of noise from before
    t = 0 (Song et al. 2021, equation 9).

    Args:
        event_shape: as of `SDE`.
        T: as of `SDE`.
        epsilon: as of `SDE`; sigma(epsilon) is 0.13 sigma_min at the defaults.
        sigma_min: the standard deviation at which noise begins to matter; below the data's finest detail.
        sigma_max: standard deviation of the prior; as large as the largest distance between two data.

    Raises:
        SDEError: not 0 < sigma_min < sigma_max, or epsilon outside (0, T).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    epsilon: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise SDEError(f"need 0 < sigma_min < sigma_max, but got {self.sigma_min!r} and {self.sigma_max!r}")

    def mean_scale(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        """Return sigma_min sqrt(r^(2 t / T) - 1)."""
        return self.sigma_min * torch.expm1(self._rate * t).sqrt()

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return 0 and 2 log(r) / T sigma_min^2 r^(2 t / T)."""
        return Coefficients(torch.zeros_like(t), self._rate * self.sigma_min**2 * torch.exp(self._rate * t))

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min) / self.T


@dataclass(frozen=True)
class VariancePreserving(SDE):
    """Shrink the data as noise grows: alpha^2 + sigma^2 = 1 (DDPM's limit; Song et al. 2021, equation 11).

        beta(t) = beta_min + (beta_max - beta_min) t / T,   B(t) = integral of beta
        alpha = exp(-B / 2),   f = -beta / 2,   g^2 = beta

    Data should have a standard deviation of about 1. Some remain at T: alpha(T) = 0.0066 at the defaults.

    Args:
        event_shape: as of `SDE`.
        T: as of `SDE`.
        epsilon: as of `SDE`; sigma(epsilon) is 0.001 at the defaults.
        beta_min: at t = 0.
        beta_max: at t = T.

    Raises:
        SDEError: not 0 < beta_min < beta_max, or epsilon outside (0, T).

    Example:
        >>> VariancePreserving(event_shape=2).marginal(1.0)
        Marginal(mean_scale=tensor(0.0066), std=tensor(1.0000))
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(beta_min=self.beta_min, beta_max=self.beta_max)
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise SDEError(f"need 0 < beta_min < beta_max, but got {self.beta_min!r} and {self.beta_max!r}")

    def mean_scale(self, t: Tensor) -> Tensor:
        """Return exp(-B / 2)."""
        return torch.exp(-self._integral(t) / 2)

    def std(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - exp(-B))."""
        return (-torch.expm1(-self._integral(t))).sqrt()

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return -beta / 2 and beta."""
        beta = self._beta(t)
        return Coefficients(-beta / 2, beta)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) / self.T * t

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) / (2 * self.T) * t**2


@dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """Shrink the data as noise grows, with less noise on the way: sigma = 1 - alpha^2 (Song et al. 2021, equation 12).

        f = -beta / 2,   g^2 = beta (1 - exp(-2 B))

    sigma starts linearly in t, not as its root, so epsilon is later: sigma(epsilon) is 0.00011 at the defaults.

    Args:
        event_shape: as of `SDE`.
        T: as of `SDE`.
        epsilon: as of `SDE`.
        beta_min: at t = 0.
        beta_max: at t = T.
    """

    epsilon: float = field(default=1e-3, kw_only=True)

    def std(self, t: Tensor) -> Tensor:
        """Return 1 - exp(-B)."""
        return -torch.expm1(-self._integral(t))

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return -beta / 2 and beta (1 - exp(-2 B))."""
        beta = self._beta(t)
        return Coefficients(-beta / 2, -beta * torch.expm1(-2 * self._integral(t)))

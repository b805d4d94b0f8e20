"""Dequantization: noise between one discrete value and the next makes the values continuous."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.errors import check_positive

__all__ = ["Dequantization", "TruncatedNormalDequantization", "UniformDequantization", "dequantize", "quantize"]

# Margin of the noise at both ends, so that float32 still distinguishes up to 256 values after it.
_EDGE = 2.0**-14
_LEVELS_OF_FLOAT32 = 256


class Dequantization(ABC):
    """Base of noise u in the unit cube that makes discrete values n = 0, ..., levels - 1 continuous.

        y = (n + u) / levels

    A density p of y then bounds the probability of n. In D dimensions, with u of density q, by Jensen's inequality

        log P(n) >= E[log p(y) - log q(u)] - D log(levels)

    (Theis et al. 2016, section 3.1). With K independent draws the bound is tighter (Burda et al. 2016; Hoogeboom et al. 2020):

        log P(n) >= E[log (1/K) sum_k p(y_k) / q(u_k)] - D log(levels)
    """

    @abstractmethod
    def draw(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        """Noise of the values' shape and device, float32, in (0, 1)."""

    @abstractmethod
    def log_density(self, noise: Tensor) -> Tensor:
        """Log q(u) of noise `(k, *event)` in nats, `(k,)`."""


@dataclass(frozen=True)
class UniformDequantization(Dequantization):
    """Uniform noise, q = 1."""

    def draw(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        """Uniform draws."""
        return torch.rand(values.shape, generator=generator, device=values.device)

    def log_density(self, noise: Tensor) -> Tensor:
        """Zero."""
        return noise.new_zeros(len(noise))


@dataclass(frozen=True)
class TruncatedNormalDequantization(Dequantization):
    """Normal noise about the middle of the interval, truncated at its ends (Zheng et al. 2023, arXiv 2305.03935).

        q(u) = N(u; 1/2, std^2) / Z,   Z = erf(1 / (2 sqrt(2) std)),   in each dimension

    Its density has no edges, which suits models of data with Gaussian noise, such as diffusion models.

    Args:
        std: standard deviation before the truncation, in steps between values. At 1/6 the ends lie three standard deviations from
            the middle, about as in the paper.

    Raises:
        ValueError: std is not positive and finite.
    """

    std: float = 1 / 6

    def __post_init__(self) -> None:
        check_positive("std", self.std)

    def draw(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        """Draws by the inverse of the distribution function."""
        uniform = torch.rand(values.shape, generator=generator, device=values.device, dtype=torch.float64)
        normal = math.sqrt(2) * torch.erfinv(self._mass * (2 * uniform - 1))
        return (0.5 + self.std * normal).float()

    def log_density(self, noise: Tensor) -> Tensor:
        """The sum of log q over the event."""
        constant = math.log(self.std * math.sqrt(2 * math.pi) * self._mass)
        return (-((noise - 0.5) / self.std).square() / 2 - constant).flatten(1).sum(dim=1)

    @property
    def _mass(self) -> float:
        return math.erf(1 / (2 * math.sqrt(2) * self.std))


def dequantize(
    values: Tensor, levels: int, dequantization: Dequantization, generator: Generator | None = None
) -> Tensor:
    """Make values n = 0, ..., levels - 1 continuous, y = (n + u) / levels, in float32, or float64 above 256 levels."""
    noise = dequantization.draw(values, generator).clamp(_EDGE, 1 - _EDGE)
    return (values + (noise if levels <= _LEVELS_OF_FLOAT32 else noise.double())) / levels


def quantize(y: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The values n and the noise u of y = (n + u) / levels."""
    scaled = y * levels
    values = scaled.floor()
    return values, scaled - values

"""Embeddings of time: waves of different frequencies, by which a network distinguishes close times."""

import math

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from divflow.errors import check_count
from divflow.networks.conditioning import NetworkError

__all__ = ["GaussianFourierEmbedding", "LogarithmicEmbedding", "SinusoidalEmbedding"]


class SinusoidalEmbedding(nn.Module):
    """Embed time as time itself and waves of fixed frequencies, in geometric progression (Vaswani et al. 2017).

        [t, sin(w_2 t), ..., sin(w_m t), cos(w_1 t), ..., cos(w_m t)],   w_i = max_frequency^((i - 1) / (m - 1))

    m is half the number of features. Time itself replaces sin(w_1 t), w_1 = 1: on [0, 1] the two hardly differ, and beyond it time is
    still one to one. The embedding has no parameters, and nothing to save.

    High frequencies cost evaluations in continuous time, because the steps of an adaptive solver and the nodes of a quadrature must
    resolve the fastest wave that the network uses. Discrete diffusion models use up to 1000 in these units. Evaluations of
    dopri5 at a tolerance of 1e-5, relative to time alone, for untrained MLPs (two hidden layers, 32 features):

    | max_frequency | 10 | 50 | 200 | 1000 |
    |---|---|---|---|---|
    | evaluations | 1.5 | 4 | 10 | 30 |

    Args:
        features: number of columns, even.
        max_frequency: frequency of the fastest wave, in radians per unit of time.

    Shape:
        t `(n,)`, returns `(n, features)`, in t's dtype but not below float32.

    Raises:
        NetworkError: features are not even and positive, or the frequency is not positive.

    Example:
        >>> SinusoidalEmbedding(4, max_frequency=10.0)(torch.tensor([0.0, 0.5]))
        tensor([[ 0.0000,  0.0000,  1.0000,  1.0000],
                [ 0.5000, -0.9589,  0.8776,  0.2837]])
    """

    def __init__(self, features: int, max_frequency: float = 50.0) -> None:
        super().__init__()
        self.features, self.max_frequency = _even(features), _positive(max_frequency, "max_frequency")

    def forward(self, t: Real[Tensor, " n"]) -> Float[Tensor, "n features"]:
        """Features of each time; see the class."""
        # Computed at each call, frequencies are exact in every dtype, whatever the module was converted to.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        exponents = torch.linspace(0, 1, self.features // 2, dtype=t.dtype, device=t.device)
        return _waves(t, self.max_frequency**exponents)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.features}, max_frequency={self.max_frequency:g}"


class GaussianFourierEmbedding(nn.Module):
    """Embed time as time itself and waves of random frequencies (Tancik et al. 2020; Song et al. 2021).

        [t, sin(2 pi w_2 t), ..., sin(2 pi w_m t), cos(2 pi w_1 t), ..., cos(2 pi w_m t)],   w_i ~ N(0, scale^2)

    m is half the number of features. The frequencies are drawn from torch's generator when the embedding is built. They are
    saved with the network, and not trained.

    Song et al. use a scale of 16, for the logarithm of the noise level. The default is lower, because high frequencies cost
    evaluations in continuous time: a scale of 4 costs as many as `SinusoidalEmbedding` with a maximum of 50.

    Args:
        features: number of columns, even.
        scale: standard deviation of the frequencies, in cycles per unit of time.

    Shape:
        t `(n,)`, returns `(n, features)`, in t's dtype but not below float32.

    Raises:
        NetworkError: features are not even and positive, or the scale is not positive.
    """

    frequencies: Tensor

    def __init__(self, features: int, scale: float = 4.0) -> None:
        super().__init__()
        self.features, self.scale = _even(features), _positive(scale, "scale")
        self.register_buffer("frequencies", self.scale * torch.randn(self.features // 2))

    def forward(self, t: Real[Tensor, " n"]) -> Float[Tensor, "n features"]:
        """Features of each time; see the class."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return _waves(t, 2 * math.pi * self.frequencies.to(t.dtype))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.features}, scale={self.scale:g}"


class LogarithmicEmbedding(nn.Module):
    """Embed time as time itself and waves of the logarithm of its distance from the data, at t = 1.

        [t, s, sin(pi h s), cos(pi h s)],   h = 1, ..., harmonics,   s = log(1 + (1 - t) / epsilon) / log(1 + 1 / epsilon)

    s falls from 1 at the noise to 0 at the data. A flow of sharp densities changes at each scale of 1 - t as much as at the next, which t
    alone hardly shows to a network. `divflow.matching.LogarithmicTimes` draws the times to train at.

    Args:
        harmonics: number of multiples.
        epsilon: distance from the data below which the scale is linear.

    Shape:
        t `(n,)`, returns `(n, 2 harmonics + 2)`, in t's dtype but not below float32. Times beyond 1 count as 1.

    Raises:
        NetworkError: epsilon is not positive.
        ValueError: harmonics are no whole number of at least 0.

    Example:
        >>> LogarithmicEmbedding(harmonics=0)(torch.tensor([0.0, 0.9, 1.0]))
        tensor([[0.0000, 1.0000],
                [0.9000, 0.5196],
                [1.0000, 0.0000]])
    """

    def __init__(self, harmonics: int = 4, epsilon: float = 0.01) -> None:
        super().__init__()
        check_count("harmonics", harmonics, least=0)
        self.harmonics, self.epsilon = harmonics, _positive(epsilon, "epsilon")
        self.features = 2 * harmonics + 2

    def forward(self, t: Real[Tensor, " n"]) -> Float[Tensor, "n features"]:
        """Features of each time; see the class."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        scale = torch.log1p((1 - t).clamp(min=0) / self.epsilon) / math.log1p(1 / self.epsilon)
        angles = math.pi * torch.arange(1, self.harmonics + 1, dtype=t.dtype, device=t.device) * scale[:, None]
        return torch.cat([t[:, None], scale[:, None], angles.sin(), angles.cos()], dim=1)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"harmonics={self.harmonics}, epsilon={self.epsilon:g}"


def _waves(t: Float[Tensor, " n"], frequencies: Float[Tensor, " m"]) -> Float[Tensor, "n features"]:
    angles = t[:, None] * frequencies
    return torch.cat([t[:, None], angles[:, 1:].sin(), angles.cos()], dim=1)


def _even(features: int) -> int:
    if features < 2 or features % 2:
        raise NetworkError(
            f"features must be even and at least 2, for a sine and a cosine of each frequency, but is {features}"
        )
    return features


def _positive(number: float, name: str) -> float:
    if not 0 < number < math.inf:
        raise NetworkError(f"{name} must be positive and finite, but is {number}")
    return float(number)

"""Functions of a squared length that are smooth at zero, where the square root has no derivative."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["arcsine_ratio", "cosine", "sine_ratio"]

# Below `limit` the first terms are exact to float64, and so are their derivatives up to the fourth.
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(13)]
_SINE_RATIO = [(-1) ** k / math.factorial(2 * k + 1) for k in range(13)]
_ARCSINE_RATIO = [math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(20)]


def cosine(q: Tensor) -> Tensor:
    """cos(sqrt(q)) for q >= 0."""
    return _smooth(q, 1.0, _COSINE, torch.cos)


def sine_ratio(q: Tensor) -> Tensor:
    """sin(sqrt(q)) / sqrt(q) for q >= 0, which is 1 at zero."""
    return _smooth(q, 1.0, _SINE_RATIO, lambda root: root.sin() / root)


def arcsine_ratio(q: Tensor, cosine: Tensor) -> Tensor:
    """The angle whose sine is sqrt(q), and whose cosine is given, divided by its sine.

    At an angle of pi it is infinite.
    """
    # Behind a right angle the sine is small, too, but the angle is not.
    ahead = torch.where(cosine > 0, q, 1.0)
    return _smooth(ahead, 0.1, _ARCSINE_RATIO, lambda root: _angle(q, cosine, root))


def _angle(q: Tensor, cosine: Tensor, root: Tensor) -> Tensor:
    sine = torch.where(cosine > 0, root, torch.where(cosine > 0, 1.0, q).sqrt())
    return torch.atan2(sine, cosine) / sine


def _smooth(q: Tensor, limit: float, coefficients: Sequence[float], away: Callable[[Tensor], Tensor]) -> Tensor:
    """A power series in q below `limit`, and a function of sqrt(q) above it."""
    near = q < limit
    # Each branch is given points where it is finite: a derivative of what is not chosen would be NaN times zero.
    small, root = torch.where(near, q, 0.0), torch.where(near, 1.0, q).sqrt()
    series = torch.full_like(small, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series = series * small + coefficient
    return torch.where(near, series, away(root))

"""Ratios of normalizing constants between neighbouring densities of a ladder."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["log_ratios"]

# Bound of the bisection: beyond it two densities do not overlap. Tilts where particles meet are far larger.
_FARTHEST = 1e5
_HALVINGS = 60


def log_ratios(tilts: Float[Tensor, "rungs samples"], betas: Float[Tensor, " rungs"]) -> Tensor:
    """Estimate log Z_{k+1} / Z_k of densities p_k(x) = exp(-V(x) - beta_k W(x)) / Z_k, in nats, `(rungs - 1,)`.

    Bennett's acceptance ratio (1976, J. Comput. Phys. 22, equation 12a): with D = (beta_{k+1} - beta_k) W and s the logistic function,
    the C that solves

        mean of s(C - D) over samples of p_k = mean of s(D - C) over samples of p_{k+1}

    is -log Z_{k+1} / Z_k, for equal numbers of samples. Both sides are monotonic in C, which is found by bisection.

    Args:
        tilts: W(x) of samples of each density; +inf is allowed, where particles meet.
        betas: beta_k, ascending.
    """
    strides = betas.diff()[:, None]
    low, high = strides * tilts[:-1], strides * tilts[1:]
    left, right = torch.full_like(betas[1:], -_FARTHEST), torch.full_like(betas[1:], _FARTHEST)
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        forward = (middle[:, None] - low).sigmoid().mean(dim=1)
        backward = (high - middle[:, None]).sigmoid().mean(dim=1)
        too_low = forward < backward
        left, right = torch.where(too_low, middle, left), torch.where(too_low, right, middle)
    return -(left + right) / 2

"""The noise to which an SDE carries data."""

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Independent, Normal

from divflow.distributions.noise import normal_like
from divflow.errors import DivflowError
from divflow.operators.field import checked_state, flatten_event

__all__ = ["Prior", "SDEError"]


class SDEError(DivflowError, ValueError):
    """A time, shape or setting for which an SDE is not defined."""


class Prior(Independent):
    """The normal distribution N(0, std^2 I) over events of one shape, and no other.

    Args:
        event_shape: shape of one sample.
        std: standard deviation.
        **settings: dtype and device of its samples; torch's defaults if not given.
    """

    def __init__(self, event_shape: tuple[int, ...], std: float, **settings: Any) -> None:
        self.std = std
        loc, scale = torch.zeros(event_shape, **settings), torch.full(event_shape, std, **settings)
        super().__init__(Normal(loc, scale, validate_args=False), len(event_shape), validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log-density of x `(k, *event)` in nats, `(k,)`.

        Raises:
            FieldError: x is not a floating-point tensor with a batch dimension.
            SDEError: x has another event shape.
        """
        if checked_state(x).shape[1:] != self.event_shape:
            raise SDEError(
                f"the prior is over events of shape {tuple(self.event_shape)}, but x has shape {tuple(x.shape)} with "
                f"events of shape {tuple(x.shape[1:])}. Give the SDE the event_shape of your data."
            )
        size = math.prod(self.event_shape)
        log_normalizer = size * (math.log(self.std) + math.log(2 * math.pi) / 2)
        return -flatten_event(x / self.std).square().sum(dim=1) / 2 - log_normalizer

    def draw(self, like: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw samples of the shape, dtype and device of `like`, `(k, *event)`, from a generator."""
        return self.std * normal_like(like, generator)

"""A network that sees time by sines and cosines."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FourierNet"]


class FourierNet(nn.Module):
    """Two hidden layers over the event and Fourier features of time.

    Args:
        event_shape: of one sample; divflow fills it in from the data.
        width: of the hidden layers.
        frequencies: number of sines, and of cosines.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`; returns `(k, *event)`.
    """

    frequencies: Tensor

    def __init__(self, event_shape: Sequence[int], width: int = 64, frequencies: int = 4) -> None:
        super().__init__()
        size = math.prod(event_shape)
        self.register_buffer("frequencies", math.pi * torch.arange(1, frequencies + 1))
        self.layers = nn.Sequential(
            nn.Linear(size + 2 * frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity or score at time t and state x."""
        angles = t.reshape(-1, 1) * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1).expand(len(x), -1)
        return self.layers(torch.cat([x.flatten(1), features], dim=1)).view_as(x)

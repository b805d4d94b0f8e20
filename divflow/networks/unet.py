"""A small UNet over image-shaped events: convolutions at several resolutions."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError, condition, time_features, zero_initialize
from divflow.networks.images import image_shape
from divflow.networks.time import SinusoidalEmbedding

__all__ = ["UNet"]

# It has no state, so all networks may share it.
_WAVES = SinusoidalEmbedding(32)


class UNet(nn.Module):
    """UNet as score or velocity: residual blocks down and up again (Ronneberger et al. 2015; Ho et al. 2020).

        block(h) = h + conv(activation(norm(conv(activation(norm(h))) + W c))),   c = mlp([embedding(t), context])

    A convolution of stride 2 leads down to the next level. Nearest neighbours and a convolution lead up again, where features
    of the way down are concatenated. `GroupNorm` acts within a sample, so samples stay independent.

    Divergence: normalization and attention let every pixel see all others, so `Exact` takes D products. Use `Hutchinson` for all but
    small images.

    Args:
        event_shape: `(channels, height, width)`.
        channels: channels of each level, from full resolution to the lowest.
        blocks: residual blocks of each level, on the way down and on the way up.
        attention: attend to all pixels of the lowest level.
        activation: class or function that makes an activation module; a smooth one (see `MLP`).
        context_features: number of features of the (flattened) context; 0 for none.
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: as for `MLP`, a sinusoidal one by default; None for time itself, one feature.

    Shape:
        t `()` or `(k,)`, x `(k, channels, height, width)`, context `(k, context_features)`; returns x's shape.

    Raises:
        NetworkError: the event is no image, its height or width is no multiple of `2^(levels - 1)`, or there are no blocks or
            channels.

    Example:
        >>> UNet((3, 8, 8), channels=(8, 16))(torch.tensor(0.5), torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        attention: bool = False,
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_features: int = 0,
        zero_init: bool = False,
        time_embedding: nn.Module | None = _WAVES,
    ) -> None:
        super().__init__()
        colors, *_ = image_shape(event_shape, len(channels), "UNet")
        if min(blocks, *channels) < 1:
            raise NetworkError(f"blocks and channels must be at least 1, but are {blocks} and {tuple(channels)}")
        self.context_features, self.time_embedding = context_features, time_embedding
        width = 4 * channels[0]
        self.conditions = nn.Sequential(
            nn.Linear(time_features(time_embedding) + context_features, width),
            activation(),
            nn.Linear(width, width),
            activation(),
        )

        def level(before: int, after: int) -> _Level:
            widths = [before, *[after] * blocks]
            return _Level(_Block(*pair, width, activation) for pair in itertools.pairwise(widths))

        steps = list(itertools.pairwise(channels))
        self.first = nn.Conv2d(colors, channels[0], 3, padding=1)
        self.down = nn.ModuleList(level(fine, fine) for fine, _ in steps)
        self.shrink = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in steps)
        self.lowest = level(channels[-1], channels[-1])
        self.attention = _Attention(channels[-1]) if attention else nn.Identity()
        self.grow = nn.ModuleList(nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in reversed(steps))
        self.up = nn.ModuleList(level(2 * fine, fine) for fine, _ in reversed(steps))
        self.last = nn.Sequential(_norm(channels[0]), activation(), nn.Conv2d(channels[0], colors, 3, padding=1))
        if zero_init:
            zero_initialize(self.last[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        conditions = self.conditions(condition(t, x, context, self.context_features, self.time_embedding))
        h, passed = self.first(x), []
        for level, shrink in zip(self.down, self.shrink, strict=True):
            passed.append(level(h, conditions))
            h = shrink(passed[-1])
        h = self.attention(self.lowest(h, conditions))
        for grow, level in zip(self.grow, self.up, strict=True):
            h = level(torch.cat([grow(_doubled(h)), passed.pop()], dim=1), conditions)
        return self.last(h)


class _Level(nn.ModuleList):
    def forward(self, h: Tensor, conditions: Tensor) -> Tensor:
        for block in self:
            h = block(h, conditions)
        return h


class _Block(nn.Module):
    def __init__(self, before: int, after: int, conditions: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(before), activation(), nn.Conv2d(before, after, 3, padding=1))
        self.shift = nn.Linear(conditions, after)
        self.second = nn.Sequential(_norm(after), activation(), nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, h: Tensor, conditions: Tensor) -> Tensor:
        return self.skip(h) + self.second(self.first(h) + self.shift(conditions)[:, :, None, None])


class _Attention(nn.Module):
    """One head over pixels, written out: torch's fused kernels have no second derivatives."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Sequential(_norm(channels), nn.Conv2d(channels, 3 * channels, 1))
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        queries, keys, values = self.project(h).flatten(2).chunk(3, dim=1)  # each (k, channels, pixels)
        weights = (queries.transpose(1, 2) @ keys / math.sqrt(h.shape[1])).softmax(dim=2)
        return h + self.out((values @ weights.transpose(1, 2)).view_as(h))


def _norm(channels: int) -> nn.GroupNorm:
    # A group of one channel would lose all where the lowest level is one pixel.
    groups = max(groups for groups in (1, 2, 4, 8) if groups == 1 or channels % (4 * groups) == 0)
    return nn.GroupNorm(groups, channels)


def _doubled(h: Tensor) -> Tensor:
    return nn.functional.interpolate(h, scale_factor=2.0)

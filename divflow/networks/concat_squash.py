"""FFJORD's gated layers over flattened events."""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from divflow.networks.conditioning import condition, time_features, zero_initialize
from divflow.networks.features import columns, point_features

__all__ = ["ConcatSquash"]


class ConcatSquash(nn.Module):
    """FFJORD's fully connected layers, whose outputs are gated and shifted by time and context (Grathwohl et al. 2019).

        layer(c, h) = (W h + b) * sigmoid(G c + d) + B c,   c = [embedding(t), context]

    Divergence: as for `MLP` if the batch shares the gates (a scalar t, no context), because they are folded into the
    matrices. With one time or context a sample each gate is another factor, and an exact divergence costs more.

    Args:
        event_shape: shape of one sample, without the batch; an int for vectors.
        hidden: width of each hidden layer.
        activation: class or function that makes an activation module; a smooth one (see `MLP`).
        context_features: number of features of the (flattened) context; 0 for none.
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: module such as `SinusoidalEmbedding`, from times `(n,)` to `(n, features)`, with an attribute `features`;
            None for time itself, one feature.
        features: module such as `FourierFeatures`, from points `(k, *event)` to `(k, features)`, with an attribute `features`; None for
            the entries themselves.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`, context `(k, context_features)`; returns `(k, *event)`.

    Raises:
        NetworkError: time embedding or features have no attribute `features`; in a call, x has another shape, or the context another number of features.

    Example:
        >>> import torch
        >>> ConcatSquash(2)(torch.tensor(0.5), torch.randn(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_features: int = 0,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.context_features, self.time_embedding, self.features = context_features, time_embedding, features
        conditions = time_features(time_embedding) + context_features
        size = math.prod(self.event_shape)
        widths = [point_features(features, size), *hidden, size]
        layers = [_GatedLinear(before, after, conditions) for before, after in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(activation() for _ in hidden)
        if zero_init:
            zero_initialize(layers[-1].linear)
            zero_initialize(layers[-1].shift)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        conditions = condition(t, x, context, self.context_features, self.time_embedding)
        if t.ndim == 0 and context is None:
            conditions = conditions[:1]  # one row of gates serves the batch
        h = columns(x, self.event_shape, self.features)
        for layer, activation in zip(self.layers, self.activations, strict=False):
            h = activation(layer(h, conditions))
        return self.layers[-1](h, conditions).view_as(x)


class _GatedLinear(nn.Module):
    def __init__(self, features: int, out_features: int, conditions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, out_features)
        self.gate = nn.Linear(conditions, out_features)
        self.shift = nn.Linear(conditions, out_features, bias=False)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        return self.linear(x) * self.gate(conditions).sigmoid() + self.shift(conditions)

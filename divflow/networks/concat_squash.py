"""FFJORD's gated layers over flattened events."""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from divflow.networks.conditioning import condition, time_features, zero_initialize

__all__ = ["ConcatSquash"]


class ConcatSquash(nn.Module):
    """Fully connected layers whose outputs time (and context) gate and shift (Grathwohl et al. 2019, FFJORD).

        layer(c, h) = (W h + b) * sigmoid(G c + d) + B c,   c = [embedding(t), context]

    Divergence: as for `MLP` where the batch shares the gates (a scalar t, no context): they are folded into the
    matrices. With one time or context a sample each gate is a factor of its own, and an exact divergence costs more.

    Args:
        event_shape: shape of one sample, without the batch; an int for vectors.
        hidden: width of each hidden layer.
        activation: class or function that makes an activation module; a smooth one (see `MLP`).
        context_features: number of features of the (flattened) context; 0 for none.
        zero_init: start with a last layer of zeros: the field vanishes and a flow is the identity.
        time_embedding: a module such as `SinusoidalEmbedding`, from times `(n,)` to `(n, features)` with its number of
            features as attribute; None for time itself, one feature.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`, context `(k, context_features)`; returns `(k, *event)`.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_features: int = 0,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.context_features, self.time_embedding = context_features, time_embedding
        conditions = time_features(time_embedding) + context_features
        size = math.prod(self.event_shape)
        widths = [size, *hidden, size]
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
        features = x.reshape(x.shape[0], math.prod(self.event_shape))
        for layer, activation in zip(self.layers, self.activations, strict=False):
            features = activation(layer(features, conditions))
        return self.layers[-1](features, conditions).view_as(x)


class _GatedLinear(nn.Module):
    def __init__(self, features: int, out_features: int, conditions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, out_features)
        self.gate = nn.Linear(conditions, out_features)
        self.shift = nn.Linear(conditions, out_features, bias=False)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        return self.linear(x) * self.gate(conditions).sigmoid() + self.shift(conditions)

"""The multilayer perceptron over flattened events."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from divflow.networks.conditioning import condition, time_features, zero_initialize
from divflow.networks.features import columns, point_features

__all__ = ["MLP", "fully_connected"]


def fully_connected(widths: Sequence[int], activation: Callable[[], nn.Module], bias: bool = True) -> nn.Sequential:
    """Linear layers of these widths with activations between them; `bias` is that of the last layer."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


class MLP(nn.Module):
    """Multilayer perceptron over the flattened event, with time and context concatenated to it.

        h_0 = [x, embedding(t), context],   h_(l+1) = activation(W_l h_l + b_l),   net(t, x) = W_L h_L + b_L

    Divergence: with up to two hidden layers `Exact` costs about one matrix product more than the value, whatever the size of the
    event. With more layers it costs about as many products as the layers are wide, or D products.

    The activation should be smooth. The derivative of a ReLU jumps: its divergence jumps in time, so that quadrature and
    adaptive solvers lose their order, and it is piecewise constant in x, with no useful gradient.

    Args:
        event_shape: shape of one sample, without the batch; an int for vectors.
        hidden: width of each hidden layer.
        activation: class or function that makes an activation module.
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
        >>> MLP(2, hidden=(32, 32))(torch.tensor(0.5), torch.randn(4, 2)).shape
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
        self.layers = fully_connected([point_features(features, size) + conditions, *hidden, size], activation)
        if zero_init:
            zero_initialize(self.layers[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        conditions = condition(t, x, context, self.context_features, self.time_embedding)
        return self.layers(torch.cat([columns(x, self.event_shape, self.features), conditions], dim=1)).view_as(x)

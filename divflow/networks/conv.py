"""A convolutional network over image-shaped events."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError, condition, time_features, zero_initialize

__all__ = ["ConvNet"]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvNet(nn.Module):
    """Convolutional network of stride 1 over events `(channels, *space)`, with time and context as further channels.

    Space has one, two or three dimensions and keeps its size. There is no normalization, which would couple all pixels, so
    every output sees only its receptive field: `(kernel_size - 1) / 2` pixels in each direction a layer.

    Divergence: `Exact` takes about `channels * (r + 1)^dimensions` products. r is the receptive radius, the number of layers times
    `(kernel_size - 1) / 2`. On small images, where this exceeds D, it takes D products. For more, use `Hutchinson`.

    Args:
        event_shape: `(channels, *space)`.
        hidden: channels of each hidden layer.
        kernel_size: size of the kernels, odd.
        activation: class or function that makes an activation module; a smooth one (see `MLP`).
        context_features: number of features of the (flattened) context; 0 for none.
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: module such as `SinusoidalEmbedding`, from times `(n,)` to `(n, features)`, with an attribute `features`;
            None for time itself, one feature.

    Shape:
        t `()` or `(k,)`, x `(k, channels, *space)`, context `(k, context_features)`; returns x's shape.

    Raises:
        NetworkError: the event has no or more than three spatial dimensions, or kernel_size is even.

    Example:
        >>> ConvNet((1, 8, 8), hidden=(16,))(torch.tensor(0.5), torch.randn(4, 1, 8, 8)).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (32, 32, 32),
        kernel_size: int = 3,
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_features: int = 0,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        if len(shape) - 1 not in _CONVOLUTIONS:
            raise NetworkError(
                f"ConvNet needs events (channels, *space) with 1 to 3 spatial dimensions, but the event shape is {shape}. "
                "Use MLP for vectors, or give images a channel dimension"
            )
        if kernel_size % 2 == 0:
            raise NetworkError(f"kernel_size must be odd, so that the image keeps its size, but is {kernel_size}")
        convolution = _CONVOLUTIONS[len(shape) - 1]
        self.context_features, self.time_embedding = context_features, time_embedding
        conditions = time_features(time_embedding) + context_features
        widths = [shape[0] + conditions, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [convolution(before, after, kernel_size, padding=kernel_size // 2), activation()]
        layers.append(convolution(widths[-1], shape[0], kernel_size, padding=kernel_size // 2))
        if zero_init:
            zero_initialize(layers[-1])
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        conditions = condition(t, x, context, self.context_features, self.time_embedding)
        planes = conditions.view(*conditions.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return self.layers(torch.cat([x, planes], dim=1))

"""A hollow multilayer perceptron: its divergence costs one product through its last, narrow part, at any depth and size."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import check_count, checked_event_shape
from divflow.networks.conditioning import NetworkError, condition, time_features
from divflow.networks.hollow import Hollow
from divflow.networks.tangents import perceptron, push_forward

__all__ = ["HollowMLP"]


class HollowMLP(Hollow):
    """Multilayer perceptron with an exact divergence: masked networks hide each entry from its own features.

        h_i = [a_i(x_1, ..., x_(i-1), t), b_i(x_(i+1), ..., x_D, t)],      net(t, x)_i = tau(x_i, h_i, embedding(t))

    a and b are fully connected with masks on their weights (Germain et al. 2015, arXiv:1502.03509). The whole is the hollow
    network of Chen & Duvenaud (2019, arXiv:1912.03579, section 3). The order is that of the flattened event.

    Divergence: its own closed form, the sum of d tau / d x_i at fixed h. It costs one product through tau alone, however deep and wide
    a and b are, and whatever the size of the event.

    Args:
        event_shape: shape of one sample, without the batch; an int for vectors.
        hidden: width of each hidden layer of a and of b. A layer that is narrower than the event hides about `size / width`
            neighbours on either side from an entry, because a unit that sees them sees the entry, too.
        features: number of features that each of a and b gives an entry.
        joint: width of each hidden layer of tau, which all entries share.
        activation: class or function that makes an activation module, an elementwise function; a smooth one (see `MLP`).
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: as for `MLP`.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`; returns `(k, *event)`.

    Raises:
        ValueError: features is not a whole number of at least 1.
        NetworkError: in a call, x has another shape; in `value_and_divergence`, the conditioner of a subclass is not hollow.

    Example:
        >>> HollowMLP(4)(torch.tensor(0.5), torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        features: int = 8,
        joint: Sequence[int] = (32,),
        activation: Callable[[], nn.Module] = nn.SiLU,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_count("features", features)
        self.event_shape, self.time_embedding = checked_event_shape(event_shape), time_embedding
        self.size, times = math.prod(self.event_shape), time_features(time_embedding)
        self.before, self.behind = (_masked(self.size, times, hidden, features, activation) for _ in range(2))
        self.joint = perceptron([1 + 2 * features + times, *joint, 1], activation, zero_init)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        return self.joint(self._joined(t, x)).view_as(x)

    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value `(k, *event)` and divergence `(k,)`, the sum of the derivatives of tau in x_i."""
        joined = self._joined(t, x)
        self.require_hollow(t, x)
        own = joined.new_zeros(joined.shape[-1])
        own[0] = 1
        value, slope = push_forward(self.joint, joined, own)
        return value.view_as(x), slope.expand_as(value).sum(dim=(1, 2))

    def conditioner(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch size features"]:
        """Features h of each entry, functions of the other entries."""
        flat, times = self.parts(x)[..., 0], condition(t, x, None, 0, self.time_embedding)
        before = self.before(torch.cat([times, flat], dim=1))
        behind = self.behind(torch.cat([times, flat.flip(1)], dim=1))
        shape = len(x), self.size, before.shape[1] // max(1, self.size)
        return torch.cat([before.view(shape), behind.view(shape).flip(1)], dim=2)

    def parts(self, x: Tensor) -> Float[Tensor, "batch size 1"]:
        """The entries.

        Raises:
            NetworkError: x does not have the shape that the network was built for.
        """
        if x.shape[1:] != self.event_shape:
            raise NetworkError(
                f"the network was built for x of shape (k, *{self.event_shape}), but x has shape {tuple(x.shape)}"
            )
        return x.reshape(len(x), self.size, 1)

    def _joined(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch size inputs"]:
        """Inputs of tau: an entry, its features, and the time."""
        parts, features = self.parts(x), self.conditioner(t, x)
        times = condition(t, x, None, 0, self.time_embedding)
        return torch.cat([parts, features, times[:, None].expand(-1, self.size, -1)], dim=2)


class _MaskedLinear(nn.Linear):
    """A linear layer with some weights fixed at zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def _masked(
    size: int, times: int, hidden: Sequence[int], features: int, activation: Callable[[], nn.Module]
) -> nn.Module:
    """Network of times and `size` entries, whose i-th outputs see only the entries before the i-th.

    A unit of degree m sees the first m entries; a weight leads from a unit to one of no lower degree.
    """
    degrees = [torch.cat([torch.zeros(times), torch.arange(1, size + 1)])]
    degrees += [
        torch.arange(width) % max(1, size) if width >= size else torch.linspace(0, size - 1, width).floor()
        for width in hidden
    ]
    degrees.append(torch.arange(size).repeat_interleave(features))
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(degrees):
        layers += [_MaskedLinear((after[:, None] >= before).float()), activation()]
    return nn.Sequential(*layers[:-1])

"""From the output of a network of order one to a score, whose size changes over orders of magnitude in time."""

import functools
import math

from torch import Tensor, nn

from divflow.divergence.exact.own import OwnDivergence, own_divergence
from divflow.operators.field import checked_value, event_size
from divflow.score.field import as_field
from divflow.score.sde import SDE, SDEError, broadcast

__all__ = ["ScaledScore"]


class ScaledScore(nn.Module):
    """Turn a network of order one into the score of data of known scale.

        s(t, x) = -x / v + alpha c / (sigma sqrt(v)) net(log(sigma / alpha) / 4, x / sqrt(v)),   v = alpha^2 c^2 + sigma^2

    (Karras et al. 2022, arXiv:2206.00364, table 1, for any linear SDE). The first term is the score of normal data of
    standard deviation c; the network learns the rest. Its inputs and outputs have order one at all times, and its time is
    the logarithm of the noise, in which scores change evenly. A network that starts at zero (`zero_init`) starts as that
    normal density.

    On a manifold it is the second term alone, of net(log(sigma) / 4, x): points keep their place, and without the network the density is
    uniform.

    Without a scale, s(t, x) = net(t, x) / sigma(t), the scaling of Song et al. (2021, appendix G and their code).

    Args:
        network: `net(t, x)`, or `net(x)`, of x's shape. The scaling does not change the cost of its divergence.
        sde: alpha and sigma.
        data_std: c, the standard deviation of the data, 1 if they are standardized; None for the plain scaling.

    Raises:
        SDEError: a standard deviation that is not positive.

    Shape:
        t `()` or `(k,)` in (0, T], x `(k, *event)`; returns x's shape.
    """

    def __init__(self, network: nn.Module, sde: SDE, data_std: float | None = 1.0) -> None:
        super().__init__()
        if data_std is not None and not 0 < data_std < math.inf:
            raise SDEError(f"data_std must be None or positive and finite, but is {data_std!r}")
        self.network, self.sde, self.data_std = as_field(network), sde, data_std

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate the score at time t and state x."""
        if self.data_std is None:
            return checked_value(self.network(t.clone(), x), x) / broadcast(self.sde.std(t), x)
        time, variance, root, gain = self._scales(t, self.data_std)
        if self.sde.manifold is not None:
            return broadcast(gain, x) * checked_value(self.network(time.clone(), x), x)
        value = checked_value(self.network(time.clone(), x / broadcast(root, x)), x)
        return broadcast(gain, x) * value - x / broadcast(variance, x)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The score and its divergence, which is linear in the network's own, if it has one."""
        own = own_divergence(self.network)
        return None if own is None else functools.partial(self._linear_in, own)

    def _linear_in(self, own: OwnDivergence, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.data_std is None:
            (value, divergence), sigma = own(t.clone(), x), self.sde.std(t)
            return checked_value(value, x) / broadcast(sigma, x), divergence / sigma
        time, variance, root, gain = self._scales(t, self.data_std)
        if self.sde.manifold is not None:
            value, divergence = own(time.clone(), x)
            return broadcast(gain, x) * checked_value(value, x), gain * divergence
        value, divergence = own(time.clone(), x / broadcast(root, x))
        score = broadcast(gain, x) * checked_value(value, x) - x / broadcast(variance, x)
        return score, gain / root * divergence - event_size(x) / variance

    def _scales(self, t: Tensor, data_std: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The network's time, v, sqrt(v), and the factor on the network."""
        alpha, sigma = self.sde.mean_scale(t), self.sde.std(t)
        variance = (alpha * data_std).square() + sigma.square()
        root = variance.sqrt()
        return (sigma / alpha).log() / 4, variance, root, alpha * data_std / (sigma * root)

"""One layer of self-attention between token-wise networks; its divergence takes one product for each entry of a token."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError
from divflow.networks.particles import ParticleFeatures, check_particles, particle_shape
from divflow.networks.tangents import perceptron, push_forward

__all__ = ["TokenMixer"]


class TokenMixer(nn.Module):
    """Process tokens one by one, let them attend to each other once, and process them one by one again.

        e_i = before(x_i, t),    h = e + out(softmax(q k^T / sqrt(w)) v),    net(t, x)_i = after(h_i)

    The attention has several heads of width w; q, k and v are linear in e (Vaswani et al. 2017, arXiv:1706.03762). The network is
    equivariant to permutations of tokens of one type.

    Divergence: its own closed form. Token i enters its own output by its query, and by its key and value at the weight that it
    gives itself, so the block d h_i / d x_i needs no other token's derivative. It costs as many products as a token has
    entries, for any number of tokens. Several layers of attention have no such form.

    Args:
        event_shape: `(tokens, entries)`.
        hidden: width of each hidden layer of `before` and, in the same order, of `after`; at least one.
        width: width of a token between them, all heads together.
        heads: number of heads; divides the width.
        activation: class or function that makes an activation module, an elementwise function; a smooth one (see `MLP`).
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        time_embedding: as for `MLP`.
        types: kind of each token, counted from 0, as an input of `before`. Use `range(tokens)` if each has its own meaning,
            None if they are alike.

    Shape:
        t `()` or `(k,)`, x `(k, tokens, entries)`; returns x's shape.

    Raises:
        NetworkError: the event shape is not one of tokens, hidden is empty, heads do not divide the width, or types are not a
            whole number for each token; in a call, x has another number of tokens.

    Example:
        >>> TokenMixer((16, 4))(torch.tensor(0.5), torch.randn(2, 16, 4)).shape
        torch.Size([2, 16, 4])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (64,),
        width: int = 64,
        heads: int = 4,
        activation: Callable[[], nn.Module] = nn.SiLU,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
        types: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.heads = particle_shape(event_shape, "TokenMixer"), heads
        if not hidden:
            raise NetworkError("TokenMixer needs at least one hidden layer, but hidden is empty")
        if heads < 1 or width % heads:
            raise NetworkError(f"heads must divide width, but got heads={heads} and width={width}")
        tokens, entries = self.event_shape
        self.first = nn.Linear(entries, hidden[0], bias=False)
        self.features = ParticleFeatures(tokens, hidden[0], types, time_embedding)
        self.before = nn.Sequential(activation(), *perceptron([*hidden, width], activation))
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.after = perceptron([width, *hidden, entries], activation, zero_init)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        check_particles(x, self.event_shape)
        tokens = self.before(self.first(x) + self.features(t, x))
        q, k, v = self._split(self.project(tokens))
        return self.after(tokens + self.out(self._join(_weights(q, k) @ v)))

    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value `(k, tokens, entries)` and divergence `(k,)`, from the derivatives of each token in its own entries."""
        check_particles(x, self.event_shape)
        entries = self.event_shape[1]
        directions = self.first.weight.T.reshape(entries, 1, 1, -1)
        tokens, directions = push_forward(self.before, self.first(x) + self.features(t, x), directions)
        projected, projections = push_forward([self.project], tokens, directions)
        mixed, mixtures = _attend_to_self(self._split(projected), self._split(projections))
        (mixed, mixtures) = push_forward([self.out], self._join(mixed), self._join(mixtures))
        value, derivatives = push_forward(self.after, tokens + mixed, directions + mixtures)
        return value, derivatives.diagonal(dim1=0, dim2=3).sum(dim=(1, 2))

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each `(*directions, k, heads, tokens, width)`."""
        return projected.unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3).unbind(0)

    def _join(self, heads: Tensor) -> Float[Tensor, "*batch tokens width"]:
        return heads.transpose(-2, -3).flatten(-2)


def _weights(q: Tensor, k: Tensor) -> Float[Tensor, "batch heads tokens tokens"]:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


def _attend_to_self(
    projected: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> tuple[Float[Tensor, "batch heads tokens width"], Float[Tensor, "directions batch heads tokens width"]]:
    """Attention, and the derivatives of each token's in directions that change this token alone.

    d score_ij = (dq_i k_j + [i = j] q_i dk_i) / sqrt(w),    d out_i = sum_j dA_ij v_j + A_ii dv_i
    """
    (q, k, v), (dq, dk, dv) = projected, directions
    weights, scale = _weights(q, k), 1 / math.sqrt(q.shape[-1])
    scores = dq @ k.transpose(-1, -2) + torch.diag_embed((q * dk).sum(dim=-1))
    weighted = weights * scores * scale
    changes = weighted - weights * weighted.sum(dim=-1, keepdim=True)
    own = weights.diagonal(dim1=-2, dim2=-1)[..., None]
    return weights @ v, changes @ v + own * dv

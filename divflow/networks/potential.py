"""Gradient fields: velocities and scores that are gradients of a scalar potential, whose divergence is its Laplacian."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.divergence import FieldError, ValueAndDivergence
from divflow.networks.conditioning import NetworkError, condition, time_features, zero_initialize
from divflow.networks.mlp import fully_connected
from divflow.operators import gradient
from divflow.operators.forward_laplacian import value_gradient_laplacian

__all__ = ["MLPPotential", "Potential", "QuadraticPotential"]


class Potential(nn.Module):
    """Gradient of a potential as a field.

        v(t, x) = sign * grad_x (phi + quadratic)(t, x),      div v = sign * laplacian (phi + quadratic)

    With sign -1 it is the velocity of OT-Flow (Onken et al. 2021, arXiv 2006.00104), or the score of an energy phi. Where the
    operations of phi have rules, `value_and_divergence` carries the Laplacian forward with the gradient
    (`divflow.operators.forward_laplacian`), without a double backward pass, also in training. phi should be smooth: the divergence takes its
    second derivatives, and training the third ones.

    Args:
        phi: module `phi(t, x) -> (k,)`, or `phi(t, x, context)` for a conditional field.
        sign: 1 or -1.
        quadratic: another potential to add, such as `QuadraticPotential`; None for none.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`, context one row a sample; returns `(k, *event)`.

    Raises:
        NetworkError: sign is neither 1 nor -1.
        FieldError: in a call, phi does not return one real number a sample.

    Example:
        >>> class Bowl(nn.Module):
        ...     def forward(self, t, x):
        ...         return (1 + t) * (x**4).sum(dim=1) / 4
        >>> Potential(Bowl(), sign=-1).value_and_divergence(torch.tensor(1.0), torch.tensor([[1.0, 2.0]]))
        ValueAndDivergence(value=tensor([[ -2., -16.]]), divergence=tensor([-30.]))
    """

    def __init__(self, phi: nn.Module, sign: int = 1, quadratic: nn.Module | None = None) -> None:
        super().__init__()
        if sign not in (1, -1):
            raise NetworkError(f"sign must be 1 or -1, but is {sign}. Include any other factor in phi")
        self.phi, self.sign, self.quadratic = phi, sign, quadratic

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Gradient at (t, x); see the class for the shapes."""
        return self.sign * gradient(lambda z: self.potential(t, z, context), x)

    def potential(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Float[Tensor, " batch"]:
        """Potential phi + quadratic, without the sign."""
        value = self.phi(*_copies(t, x) if context is None else _copies(t, x, context))
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FieldError(
                f"phi must return one number a sample, shape ({x.shape[0]},) for x of shape {tuple(x.shape)}, but "
                f"returned {found}. Sum over the event's dimensions, or squeeze a last one of size 1"
            )
        value = value if self.quadratic is None else value + self.quadratic(*_copies(t, x))
        if value.is_complex():
            raise FieldError(
                f"a potential must be real, as its field is, but phi returned {value.dtype}. Take its real part, or differentiate a wave "
                "function by divflow.operators, whose derivatives may be complex"
            )
        return value

    def value_and_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> ValueAndDivergence:
        """Field `(k, *event)` and its divergence `(k,)`, sign times the Laplacian, from one pass.

        Raises:
            FieldError: phi does not return one number a sample, or mixes samples.
        """
        of_context = self.potential if context is None else lambda t, z: self.potential(t, z, context)
        _, slope, laplacian = value_gradient_laplacian(of_context, t, x)
        return ValueAndDivergence(self.sign * slope, self.sign * laplacian)

    def extra_repr(self) -> str:
        """The sign."""
        return f"sign={self.sign}"


def _copies(*given: Tensor) -> list[Tensor]:
    """What a module may write to, where what was given is its caller's, or the next one's."""
    return [tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in given]


class QuadraticPotential(nn.Module):
    """Quadratic part of OT-Flow's potential, with s = [x, t] (Onken et al. 2021, equation 9).

        1/2 s^T A^T A s + b^T s

    The constant is left out, because the field does not depend on it. b starts at 0, and A small.

    Args:
        event_shape: shape of one sample, without the batch; an int for vectors.
        rank: number of rows of A, at most D + 1.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`; returns `(k,)`.

    Raises:
        NetworkError: rank is below 1.
    """

    def __init__(self, event_shape: int | Sequence[int], rank: int = 10) -> None:
        super().__init__()
        if rank < 1:
            raise NetworkError(f"rank must be at least 1, but is {rank}. For no quadratic part, leave it out")
        size = 1 + math.prod((event_shape,) if isinstance(event_shape, int) else event_shape)
        self.linear = nn.Parameter(torch.zeros(size))
        self.square_root = nn.Parameter(torch.randn(min(rank, size), size) / size)

    def forward(self, t: Tensor, x: Tensor) -> Float[Tensor, " batch"]:
        """The value at (t, x)."""
        s = torch.cat([x.reshape(x.shape[0], len(self.linear) - 1), condition(t, x, None, 0)], dim=1)
        return 0.5 * (s @ self.square_root.mT).square().sum(dim=1) + s @ self.linear


class MLPPotential(Potential):
    """Gradient of a multilayer perceptron with one output, over the flattened event, time and context.

    Divergence: with one hidden layer it costs about what the value does, with more about one forward pass a dimension.

    Args:
        event_shape: shape of one sample, without the batch; an int for vectors.
        hidden: width of each hidden layer.
        activation: class or function that makes an activation module; twice differentiable.
        context_features: number of features of the (flattened) context; 0 for none.
        zero_init: start with a last layer of zeros, so that without quadratic part the field vanishes.
        time_embedding: module such as `SinusoidalEmbedding`; None for time itself.
        sign: 1 or -1.
        quadratic_rank: rank of a `QuadraticPotential` that is added; 0 for none.

    Shape:
        t `()` or `(k,)`, x `(k, *event)`, context `(k, context_features)`; returns `(k, *event)`.

    Example:
        >>> MLPPotential(2)(torch.tensor(0.5), torch.randn(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_features: int = 0,
        zero_init: bool = False,
        time_embedding: nn.Module | None = None,
        sign: int = 1,
        quadratic_rank: int = 0,
    ) -> None:
        phi = _ScalarMLP(event_shape, hidden, activation, context_features, zero_init, time_embedding)
        super().__init__(phi, sign, QuadraticPotential(event_shape, quadratic_rank) if quadratic_rank else None)


class _ScalarMLP(nn.Module):
    """Fully connected layers to one number; the last has no bias, on which the gradient would not depend."""

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int],
        activation: Callable[[], nn.Module],
        context_features: int,
        zero_init: bool,
        time_embedding: nn.Module | None,
    ) -> None:
        super().__init__()
        self.size = math.prod((event_shape,) if isinstance(event_shape, int) else event_shape)
        self.context_features, self.time_embedding = context_features, time_embedding
        conditions = time_features(time_embedding) + context_features
        self.layers = fully_connected([self.size + conditions, *hidden, 1], activation, bias=False)
        if zero_init:
            zero_initialize(self.layers[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Float[Tensor, " batch"]:
        conditions = condition(t, x, context, self.context_features, self.time_embedding)
        return self.layers(torch.cat([x.reshape(x.shape[0], self.size), conditions], dim=1)).squeeze(1)

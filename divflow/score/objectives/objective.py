"""The protocol of score-matching objectives: a loss for each sample, on one scale."""

from abc import ABC, abstractmethod

from torch import Generator, Tensor

from divflow.divergence import Field
from divflow.manifolds import TangentField
from divflow.operators.field import accumulation_dtype, as_time, checked_state, flatten_event
from divflow.score.field import Score, as_field

__all__ = ["Objective", "half_squared_norm", "in_lengths"]


class Objective(ABC):
    """Base class of losses whose mean over data is half of the score's Fisher divergence, up to a constant.

        E[loss] = E[|s(t, x) - grad_x log p(x)|^2] / 2 + constant

    On a manifold the score is a `TangentField`; lengths, divergence and gradient are those of the manifold.

    The constant has no parameters, so all objectives agree in expectation, and in their gradients. Losses have the units
    of 1 / x^2.

    Your own objective implements `loss`; `TimeConditionalScoreMatching` then takes it, too.
    """

    def __call__(
        self, score: Score, x: Tensor, t: Tensor | float | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Compute the losses of a batch, `(k,)`, differentiable in the score's parameters.

        Args:
            score: `score(t, x)`, or `score(x)`; returns a tensor of x's shape, and treats samples independently.
            x: data `(k, *event)`, of a floating dtype.
            t: passed to the score as its time, a scalar or one per sample; 0 if None.
            generator: of everything that is drawn; torch's default one if None.

        Raises:
            FieldError: the score's value, x or t has a wrong type, shape, dtype or device.
        """
        x = checked_state(x)
        return self.loss(as_field(score), as_time(0.0 if t is None else t, x), x, generator)

    @abstractmethod
    def loss(
        self,
        score: Field,
        t: Tensor,
        x: Tensor,
        generator: Generator | None = None,
        conditional_score: Tensor | None = None,
    ) -> Tensor:
        """Compute the losses `(k,)` at states x of time t.

        Args:
            score: `score(t, x)`.
            t: `()` or `(k,)`.
            x: states `(k, *event)`.
            generator: of everything that is drawn.
            conditional_score: if x is a datum with noise, the score of x given that datum, `(k, *event)`.
        """


def in_lengths(score: Field, values: Tensor) -> Tensor:
    """Scale values of a score on a manifold such that their Euclidean lengths are the manifold's; others as they are.

    Args:
        score: a `TangentField`, or any other field.
        values: `(k, *event)`.
    """
    return values * score.manifold.scale(values) if isinstance(score, TangentField) else values


def half_squared_norm(values: Tensor) -> Tensor:
    """Compute |v|^2 / 2 over the event, `(k,)`, in float32 at least.

    Args:
        values: v, `(k, *event)`.
    """
    return flatten_event(values).to(accumulation_dtype(values)).square().sum(dim=1) / 2

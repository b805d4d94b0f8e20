"""Implicit score matching: the score of the data is never needed, the divergence of the model's is."""

from dataclasses import dataclass

from torch import Generator, Tensor

from divflow.divergence import Estimator, Exact, Field
from divflow.score.objectives.objective import Objective, half_squared_norm

__all__ = ["ImplicitScoreMatching"]

_EXACT = Exact()


@dataclass(frozen=True)
class ImplicitScoreMatching(Objective):
    """div s(t, x) + |s(t, x)|^2 / 2 (Hyvarinen 2005, theorem 1).

    Integration by parts turns the product of s with the data's score into a divergence; it supposes a density that is
    differentiable and vanishes at infinity, as uniform densities with edges do not. With `Exact()` the objective has no
    variance beyond that of the data, at about the price of one probe on networks that the layered method follows.

    Args:
        estimator: of the divergence; any of `divflow.divergence`.
    """

    estimator: Estimator = _EXACT

    def loss(
        self,
        score: Field,
        t: Tensor,
        x: Tensor,
        generator: Generator | None = None,
        conditional_score: Tensor | None = None,
    ) -> Tensor:
        """See `Objective.loss`; differentiating it once takes the second derivatives of s."""
        value, divergence = self.estimator(score, t, x, generator)
        return divergence + half_squared_norm(value)

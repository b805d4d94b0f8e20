"""Implicit score matching: it needs the divergence of the model's score, and never the score of the data."""

from dataclasses import dataclass

from torch import Generator, Tensor

from divflow.divergence import Estimator, Exact, Field
from divflow.score.objectives.objective import Objective, half_squared_norm, in_lengths

__all__ = ["ImplicitScoreMatching"]

_EXACT = Exact()


@dataclass(frozen=True)
class ImplicitScoreMatching(Objective):
    """Train a score on the data themselves, through its divergence (Hyvarinen 2005, theorem 1).

        div s(t, x) + |s(t, x)|^2 / 2

    Integration by parts turns the product of s with the data's score into a divergence. It assumes a density that is
    differentiable and vanishes at infinity, which excludes uniform densities with edges. With `Exact()` the objective has
    no variance beyond that of the data, at about the cost of one probe on networks that the layered method follows.

    Args:
        estimator: of the divergence; any of `divflow.divergence`.

    Example:
        >>> import torch
        >>> ImplicitScoreMatching()(lambda t, x: -x, torch.zeros(2, 3))
        tensor([-3., -3.])
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
        """Compute the losses, as `Objective.loss`; differentiating them once takes the second derivatives of s."""
        value, divergence = self.estimator(score, t, x, generator)
        return divergence + half_squared_norm(in_lengths(score, value))

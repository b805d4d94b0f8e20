"""The density of data through their preprocessing, modelled by a score: with an SDE that of its probability flow."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn

from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.data_density import computed_dtype, in_units
from divflow.flow.rows import checked_rows
from divflow.flow.transforms import Transform
from divflow.manifolds import Coordinates, TangentField
from divflow.operators.field import Field
from divflow.score.field import AtTime, Score, as_field, evaluate
from divflow.score.probability_flow import ProbabilityFlow
from divflow.score.sampling import ProbabilityFlowODE, Sampler
from divflow.score.sde import SDE

__all__ = ["ScoreDensity", "UnnormalizedDensity"]


class ScoreDensity(FlowDensity):
    """The density of data in their own units, modelled by a score over an SDE: that of its probability flow.

    Args:
        flow: `probability_flow(score, sde)`, of the transformed data y = T(x).
        transform: T, from the data, with its log-determinant.
        sampler: over the same SDE; `ProbabilityFlowODE` with the flow's solver if None.

    Raises:
        ValueError: a sampler over another SDE.
    """

    def __init__(self, flow: ContinuousFlow, transform: Transform, sampler: Sampler | None = None) -> None:
        super().__init__(flow, transform)
        self.sampler = sampler
        score, manifold = self._probability_flow.score, self.sde.manifold
        # In a tuple, so that it is no submodule: the flow has the score's parameters already.
        self._score = (score if manifold is None else TangentField(score, manifold),)
        over = getattr(sampler, "sde", None)
        if sampler is not None and over != self.sde:
            raise ValueError(f"the score is over {self.sde}, but the sampler over {over}")

    @property
    def sde(self) -> SDE:
        """The SDE to whose marginals the score belongs."""
        return self._probability_flow.sde

    @property
    def score_field(self) -> Field:
        """The trained score s(t, y) of the transformed data; on a manifold a `TangentField`."""
        return self._score[0]

    @property
    def _probability_flow(self) -> ProbabilityFlow:
        velocity = self.flow.velocity
        return cast(ProbabilityFlow, velocity.field if isinstance(velocity, TangentField) else velocity)

    def score(self, x: Tensor) -> Tensor:
        """Compute the score of the data, grad log p(x), `(k, *event)`, at the model's earliest time, sde.epsilon."""
        checked_rows(x, self.flow.event_shape)
        return _score_of_data(self.score_field, self.sde.epsilon, x, self.transform, self.dtype)

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Draw samples of the data `(num_samples, *event)` in float64, without gradient; scores take no context."""
        sampler = self.sampler or ProbabilityFlowODE(self.sde, self.flow.solver)
        return self.in_units(sampler(self.score_field, num_samples, generator).samples)

    def with_flow(self, flow: ContinuousFlow) -> "ScoreDensity":
        """Return the same density, evaluated by another flow, such as one with another estimator."""
        return self.like_this(ScoreDensity(flow, self.transform, self.sampler))


class UnnormalizedDensity(nn.Module):
    """The density of data with a known score and an unknown normalization: no SDE, no log_prob.

    Args:
        score: `score(t, y)`, or `score(y)`, of the transformed data y = T(x).
        transform: T, from the data.
        sampler: `AnnealedLangevin`, of the same levels if there are any; without one `sample` is refused.
        levels: the noise levels of the training, which the score takes as its time; the least stands for the data. None for
            a score of one time, t = 0, whatever step sizes the sampler takes.

    Attributes:
        columns: the names of the data's columns, as of `FlowDensity`.
        coordinates: in which the data's file has points, as of `FlowDensity`.

    Raises:
        ValueError: a sampler of other levels.
    """

    columns: list[str] | None = None
    coordinates: Coordinates | None = None

    def __init__(
        self,
        score: Score,
        transform: Transform,
        sampler: Sampler | None = None,
        levels: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.score_field, self.transform, self.sampler = as_field(score), transform, sampler
        self.levels = None if levels is None else tuple(levels)
        taken = getattr(sampler, "sigmas", ())
        if levels is not None and set(taken) - set(levels):
            raise ValueError(f"the score was trained at the levels {self.levels}, but the sampler takes {taken}")

    def score(self, x: Tensor) -> Tensor:
        """Compute the score of the data, grad log p(x), `(k, *event)`."""
        return _score_of_data(self.score_field, min(self.levels or [0.0]), x, self.transform, computed_dtype(self))

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Draw samples of the data `(num_samples, *event)` in float64, without gradient; scores take no context.

        Raises:
            ValueError: there is no sampler.
        """
        if self.sampler is None:
            raise ValueError(
                "this score has no sampler. Build the UnnormalizedDensity with one, such as AnnealedLangevin(2, [0.5, 0.1])."
            )
        score = AtTime(self.score_field, 0.0) if self.levels is None else self.score_field
        return in_units(self.transform, self.sampler(score, num_samples, generator).samples)


def _score_of_data(score: Field, t: float, x: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
    """grad_x log p(x) = (dT/dx)^T s(t, T(x)) + grad_x log |det dT/dx|."""
    with torch.inference_mode(False), torch.enable_grad():
        transform.check_values(transform.checked(checked_rows(x)))
        x = x.detach().clone().requires_grad_()
        y, log_det = transform(x, values=False)
        with torch.no_grad():
            y_score = evaluate(score, torch.tensor(t, dtype=dtype, device=y.device), y.detach().to(dtype))
        (gradient,) = torch.autograd.grad((y * y_score.to(y)).sum() + log_det.sum(), x)
    return gradient

"""Training a score by score matching."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.batch import Batch, Keys
from divflow.divergence import check_field
from divflow.divergence.check import check_sample_times
from divflow.flow import ContinuousFlow
from divflow.flow.transforms import Affine
from divflow.score import ScoreDensity, UnnormalizedDensity
from divflow.score.objectives import Objective, TimeConditionalScoreMatching
from divflow.score.probability_flow import probability_flow
from divflow.tasks.errors import TrainingError
from divflow.tasks.task import Task, mean

__all__ = ["ScoreTask"]


class ScoreTask(Task):
    """Train a score by score matching.

    The loss is the mean of an objective over a batch, in the units of the transformed data, and a weighted mean if samples have
    weights (`Task`). Validation and test evaluate:

    - over an SDE the likelihood, since the score defines the density of its probability flow;
    - without SDE the objective and, where the true score is known, the Fisher divergence from it.

    Logged:

    - `train/loss`, and `loss` in validation and test, with noise of a fixed seed;
    - `fisher_divergence`, E |s - grad log p|^2 / 2 (1 / the data's units squared; at the earliest time of an SDE), where it is known;
    - over an SDE what `FlowTask` logs in validation and test: `nll` (nats), `bits_per_dim`, `gap`, `nfe`, `nfe_divergence`,
      `quadrature_error`, `estimator_error`, and in the test their standard errors.

    Args:
        score: module `score(t, x)` or `score(x)` that is trained and saved. A `ScoreDensity` (over an SDE) or an
            `UnnormalizedDensity` (without) adds the transform of the data and a sampler.
        objective: one of `divflow.score.objectives`.
        optimizer: function of the parameters that returns the optimizer.
        scheduler: function of the optimizer that returns a learning rate schedule; None for none. It steps after every
            optimizer step; a `ReduceLROnPlateau` steps after every validation.
        evaluation: flow that validation and test evaluate, for example with another estimator or solver. It shares the trained
            score; the flow of the density itself if None.
        config: plain dict that is saved in each checkpoint. `divflow.load` rebuilds the density from it, and
            `load_from_checkpoint` the task, if it has `task`, as `build_task` takes it.
        monitor: name of the validation value that `ReduceLROnPlateau` follows; if None `val/nll`, or `val/loss` without SDE.
        keys: where x and weight are in a batch that is a dict or a tuple of other parts, such as
            `{"x": "image", "weight": "w"}` or `{"x": 0, "weight": 2}` (`divflow.data.batch.parts_of`).

    Raises:
        ValueError: objective and score do not belong to one SDE, or `evaluation` is given for a score without SDE.
        SDEError: a module is to be trained over an SDE without event shape.
        DataError, FieldError: in training, `parts_of` refuses a batch.
        TrainingError: in training, a loss or gradient is not finite.

    Example:
        >>> from divflow.networks import MLP
        >>> from divflow.score.objectives import ImplicitScoreMatching
        >>> task = ScoreTask(MLP(2), ImplicitScoreMatching())  # for lightning.Trainer().fit(task, loader)
    """

    density: ScoreDensity | UnnormalizedDensity

    def __init__(
        self,
        score: nn.Module,
        objective: Objective,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        evaluation: ContinuousFlow | None = None,
        config: dict[str, Any] | None = None,
        monitor: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(_as_density(score, objective), optimizer, scheduler, config, monitor, keys)
        if evaluation is not None and isinstance(self.density, UnnormalizedDensity):
            raise ValueError("evaluation must be None for an UnnormalizedDensity, which has no flow. Leave it out")
        self.objective = objective
        # In a tuple, so that it is no submodule: it shares the trained score's parameters.
        self._evaluation = (evaluation,)

    @property
    def evaluated_density(self) -> ScoreDensity | UnnormalizedDensity:
        """Density that validation and test evaluate."""
        density, (flow,) = self.density, self._evaluation
        return density.with_flow(flow) if isinstance(density, ScoreDensity) and flow is not None else density

    def check(self, batch: Batch) -> None:
        """Check the score before the first step: a field that treats samples independently, with correct derivatives.

        Raises:
            TrainingError: the data have a context, which scores do not take.
            FieldError: the score is no such field, or over an SDE takes only scalar times.
        """
        y, objective = self._transformed(batch), self.objective
        if isinstance(objective, TimeConditionalScoreMatching) and len(y):
            several = y if len(y) > 1 else y.repeat(2, *[1] * (y.ndim - 1))
            who = "score matching over an SDE draws a time for each sample, but the score"
            check_sample_times(self.density.score_field, objective.sde.epsilon, objective.sde.T, several, who)
        estimator = getattr(self.objective, "estimator", None)
        check_field(self.density.score_field, self._time(y), y, gradient=True, estimator=estimator)

    def check_evaluation(self, batch: Batch) -> None:
        """Check the score in evaluation mode, before the first step: autograd must see all of its derivatives.

        Raises:
            FieldError: autograd does not see all of them.
        """
        y = self._transformed(batch)
        check_field(self.evaluated_density.score_field, self._time(y), y)

    def _time(self, y: Tensor) -> Tensor | float:
        """Times at which the score is trained: one for each sample over an SDE, else a scalar."""
        objective = self.objective
        return objective.draw_times(y).t if isinstance(objective, TimeConditionalScoreMatching) else 0.5

    def loss(self, batch: Batch) -> Tensor:
        """Mean of the objective over a batch."""
        losses = self.objective(self.density.score_field, self._transformed(batch))
        loss = mean(losses, self.shares(self.parts(batch).weight))
        self.log("train/loss", loss.detach())
        return loss

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """Evaluate the objective with the same noise at every validation, the Fisher divergence and the log-density."""
        density = self.evaluated_density
        noise = Generator(self.device).manual_seed(batch_idx)
        values: dict[str, Tensor | None] = {
            "loss": self.objective(density.score_field, self._transformed(batch), generator=noise)
        }
        x = self.parts(batch).x
        truth = None if self.data is None else self.data.score(x)
        if truth is not None:
            values["fisher_divergence"] = (density.score(x) - truth).flatten(1).square().sum(dim=1) / 2
        return values | (self.likelihood_values(density, batch) if isinstance(density, ScoreDensity) else {})

    @torch.no_grad()
    def _transformed(self, batch: Batch) -> Tensor:
        x, context, _ = self.parts(batch)
        if context is not None:
            raise TrainingError(
                "scores take no context, but the data have one. Train a flow: task=flow or task=flow_matching, or leave it "
                "out by keys={'x': ...}, the key or the place of x"
            )
        y, _ = self.density.transform(x, values=False)
        parameter = next(self.parameters(), None)
        return y if parameter is None else y.to(parameter.dtype)


def _as_density(score: nn.Module, objective: Objective) -> ScoreDensity | UnnormalizedDensity:
    sde = objective.sde if isinstance(objective, TimeConditionalScoreMatching) else None
    if not isinstance(score, ScoreDensity | UnnormalizedDensity):
        if sde is not None:
            return ScoreDensity(probability_flow(score, sde), Affine())
        several = getattr(objective, "sigma", None)
        return UnnormalizedDensity(score, Affine(), levels=several if isinstance(several, tuple) else None)
    if isinstance(score, ScoreDensity) != (sde is not None):
        raise ValueError(
            f"{type(objective).__name__} can't train a {type(score).__name__}. Use TimeConditionalScoreMatching over its SDE for a "
            "ScoreDensity, and any other objective for an UnnormalizedDensity"
        )
    if isinstance(score, ScoreDensity) and score.sde != sde:
        raise ValueError(f"the score is over {score.sde}, but the objective is over {sde}. Build both with one SDE")
    return score

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
    """Score matching: the loss is the mean of an objective over the batch, in the units of the transformed data.

    It is a weighted mean, where samples have weights (`Task`). Over an SDE the score defines a density, that of its probability flow, by which it is judged; without one it is
    judged by the objective, and where the truth is known by its Fisher divergence from it.

    Logged: `train/loss`, `{val,test}/loss` (of the evaluation's fixed seed), `/fisher_divergence`, E |s - grad log p|^2 / 2
    (1 / the data's units squared; at the earliest time of an SDE), where the truth is known; over an SDE what `FlowTask`
    logs in validation and test: `/nll` (nats), `/bits_per_dim`, `/gap`, `/nfe`, `/nfe_divergence`, `/quadrature_error`,
    `/estimator_error`; in the test also the standard errors.

    Args:
        score: what is trained and saved: a module `score(t, x)` or `score(x)`, or one with the data's transform and a
            sampler, a `ScoreDensity` (over an SDE) or an `UnnormalizedDensity` (without).
        objective: of `divflow.score.objectives`.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, stepped after every step of the optimizer, or, if it
            is a `ReduceLROnPlateau`, after every validation; None for none.
        evaluation: the flow that judges in validation and test, such as one of another estimator or solver that
            shares the trained score; the density's own if None.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density, and `load_from_checkpoint` the
            task, if it has `task`, as `build_task` takes it.
        monitor: the validation's value that `ReduceLROnPlateau` follows; `val/nll`, or `val/loss` of a score without SDE, if None.
        keys: where x and weight are in a batch that is a dict or a tuple of other parts, such as `{"x": "image", "weight":
            "w"}` or `{"x": 0, "weight": 2}` (`divflow.data.batch.parts_of`).

    Raises:
        ValueError: an objective over an SDE for a score without one, or the other way round, or over another; a flow
            to evaluate a score without SDE.
        SDEError: a module is to be trained over an SDE that was given no event shape.
        DataError, FieldError: while training, a batch that `parts_of` refuses.
        TrainingError: a loss or gradient that is not finite.
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
        """The density as validation and test evaluate it."""
        density, (flow,) = self.density, self._evaluation
        return density.with_flow(flow) if isinstance(density, ScoreDensity) and flow is not None else density

    def check(self, batch: Batch) -> None:
        """Before the first step: the score must be a field, treat the samples independently, and have right derivatives.

        Raises:
            TrainingError: the data have a context, which scores do not take.
            FieldError: naming what is wrong; over an SDE, a score that takes none but scalar times, too.
        """
        y, objective = self._transformed(batch), self.objective
        if isinstance(objective, TimeConditionalScoreMatching) and len(y):
            several = y if len(y) > 1 else y.repeat(2, *[1] * (y.ndim - 1))
            who = "score matching over an SDE draws a time for each sample, but the score"
            check_sample_times(self.density.score_field, objective.sde.epsilon, objective.sde.T, several, who)
        estimator = getattr(self.objective, "estimator", None)
        check_field(self.density.score_field, self._time(y), y, gradient=True, estimator=estimator)

    def check_evaluation(self, batch: Batch) -> None:
        """Before the first step, in evaluation mode: the score that is judged must hide no derivative."""
        y = self._transformed(batch)
        check_field(self.evaluated_density.score_field, self._time(y), y)

    def _time(self, y: Tensor) -> Tensor | float:
        """A time at which the score is trained, one for each of the data where it is at many."""
        objective = self.objective
        return objective.draw_times(y).t if isinstance(objective, TimeConditionalScoreMatching) else 0.5

    def loss(self, batch: Batch) -> Tensor:
        """The mean of the objective over a batch."""
        losses = self.objective(self.density.score_field, self._transformed(batch))
        loss = mean(losses, self.shares(self.parts(batch).weight))
        self.log("train/loss", loss.detach())
        return loss

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """The objective with noise that is the same at every validation, the Fisher divergence and the log-density."""
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

"""Training a continuous normalizing flow by flow matching."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.batch import Batch, Keys
from divflow.errors import check_count
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.matching import ConditionalFlowMatching
from divflow.operators.context import repeated
from divflow.tasks.flow_density import FlowDensityTask
from divflow.tasks.task import mean
from divflow.verification import severed_fields

__all__ = ["FlowMatchingTask"]

_OBJECTIVE = ConditionalFlowMatching()


class FlowMatchingTask(FlowDensityTask):
    """Flow matching: the loss is the mean of `ConditionalFlowMatching` over the batch, in the units of the transformed data squared.

    It is a weighted mean, where samples have weights (`Task`). Training solves no ODE: a step costs one evaluation of the velocity, forward and backward. The flow is judged by the exact
    likelihood of the data, as `FlowTask` judges, which solves it; validate seldom.

    Logged: `train/loss`; in validation and test what `FlowTask` logs there: `/nll` (nats), `/bits_per_dim`, `/gap`, `/nfe`,
    `/nfe_divergence`, `/quadrature_error`, `/estimator_error`; in the test also the standard errors.

    Args:
        flow: what is trained and saved: a flow with t_base = 0 and t_data = 1, whose base gives the noise, or a `FlowDensity`, which
            adds the data's transform to it. Its velocity takes one time a sample.
        objective: path, coupling and times.
        draws: pairs of noise and time for each datum in a step, 1 or more: they cost less than more data, and lower the variance
            of the gradient almost as well.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, stepped after every step of the optimizer, or, if it
            is a `ReduceLROnPlateau`, after every validation; None for none.
        evaluation: the flow that judges in validation and test, such as one of another estimator or solver that
            shares the trained one's velocity; the trained one itself if None.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density, and `load_from_checkpoint` the
            task, if it has `task`, as `build_task` takes it.
        monitor: the validation's value that `ReduceLROnPlateau` follows; `val/nll` if None.
        keys: where x, context and weight are in a batch that is a dict or a tuple of other parts, such as `{"x": "image", "context":
            "label"}` or `{"x": 0, "weight": 2}` (`divflow.data.batch.parts_of`).

    Raises:
        ValueError: a flow whose times are others than those of the paths, or no draws.
        FieldError: when training begins, a velocity that mixes the batch, or takes none but scalar times.
        DataError, FieldError: while training, a batch that `parts_of` refuses.
        TrainingError: a loss or gradient that is not finite.
    """

    def __init__(
        self,
        flow: ContinuousFlow | FlowDensity,
        objective: ConditionalFlowMatching = _OBJECTIVE,
        draws: int = 1,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        evaluation: ContinuousFlow | None = None,
        config: dict[str, Any] | None = None,
        monitor: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(flow, optimizer, scheduler, evaluation, config, monitor, keys)
        check_count("draws", draws)
        self.objective, self.draws = objective, draws
        t_base, t_data = self.density.flow.times()
        if (t_base, t_data) != (0.0, 1.0):
            raise ValueError(
                f"the paths of flow matching lead from noise at t = 0 to data at t = 1, but the flow has t_base={t_base:g} "
                f"and t_data={t_data:g}. Leave both at their defaults, t_base=0.0 and t_data=1.0"
            )

    def check(self, batch: Batch) -> None:
        """Before the first step: the velocity must be a field, treat the samples independently, and take a time for each."""
        x, context = self.checked(batch)
        flow = self.density.flow
        with severed_fields("allow") if flow.detached else contextlib.nullcontext():
            self.objective.check(flow.velocity, x, context)
        self.check_base(x, context)

    def loss(self, batch: Batch) -> Tensor:
        """The mean of the objective over a batch."""
        flow, (x, context), weight = self.density.flow, self.transformed(batch), self.parts(batch).weight
        x, context, weight = (repeated(part, self.draws) for part in (x, context, weight))
        noise = flow.sample_base(len(x)).to(x)
        losses = self.objective(flow.velocity, x, noise=noise, context=context, weight=weight)
        loss = mean(losses, self.shares(weight))
        self.log("train/loss", loss.detach())
        return loss

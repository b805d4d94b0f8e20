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
    """Train a flow by flow matching, without solving an ODE.

    The loss is the mean of `ConditionalFlowMatching` over a batch, in squared units of the transformed data. If samples have
    weights, it is a weighted mean (`Task`). A training step costs one evaluation of the velocity, forward and backward.
    Validation and test evaluate the exact likelihood of the data, as `FlowTask` does. They solve the ODE, so validate seldom.

    Logged:

    - `train/loss`;
    - in validation and test what `FlowTask` logs there: `/nll` (nats), `/bits_per_dim`, `/gap`, `/nfe`, `/nfe_divergence`,
      `/quadrature_error`, `/estimator_error`;
    - in the test also their standard errors.

    Args:
        flow: flow that is trained and saved, or a `FlowDensity`, which adds the transform of the data to it. It needs t_base = 0
            and t_data = 1; its base gives the noise; its velocity takes one time a sample.
        objective: path, coupling and times.
        draws: pairs of noise and time for each sample in a step, at least 1. More draws cost less than more data, and lower
            the variance of the gradient almost as well.
        optimizer: function of the parameters that returns the optimizer.
        scheduler: function of the optimizer that returns a learning rate schedule; None for none. It steps after every
            optimizer step; a `ReduceLROnPlateau` steps after every validation.
        evaluation: flow that validation and test evaluate, for example with another estimator or solver. It shares the
            velocity of the trained flow; that flow itself if None.
        config: plain dict that is saved in each checkpoint. `divflow.load` rebuilds the density from it, and
            `load_from_checkpoint` the task, if it has `task`, as `build_task` takes it.
        monitor: name of the validation value that `ReduceLROnPlateau` follows; `val/nll` if None.
        keys: where x, context and weight are in a batch that is a dict or a tuple of other parts, such as
            `{"x": "image", "context": "label"}` or `{"x": 0, "weight": 2}` (`divflow.data.batch.parts_of`).

    Raises:
        ValueError: the times of the flow are not those of the paths, or `draws` is no whole number of at least 1.
        FieldError: when training begins, the velocity mixes the samples of a batch, or takes only scalar times.
        DataError, FieldError: in training, `parts_of` refuses a batch.
        TrainingError: in training, a loss or gradient is not finite.

    Example:
        >>> from divflow import ContinuousFlow
        >>> from divflow.networks import MLP
        >>> task = FlowMatchingTask(ContinuousFlow(MLP(2), 2))  # for lightning.Trainer().fit(task, loader)
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
        """Check the velocity before the first step: a field that treats samples independently and takes one time for each.

        Raises:
            FieldError: it is not.
        """
        x, context = self.checked(batch)
        flow = self.density.flow
        with severed_fields("allow") if flow.detached else contextlib.nullcontext():
            self.objective.check(flow.velocity, x, context)
        self.check_base(x, context)

    def loss(self, batch: Batch) -> Tensor:
        """Mean of the objective over a batch."""
        flow, (x, context), weight = self.density.flow, self.transformed(batch), self.parts(batch).weight
        x, context, weight = (repeated(part, self.draws) for part in (x, context, weight))
        noise = flow.sample_base(len(x)).to(x)
        losses = self.objective(flow.velocity, x, noise=noise, context=context, weight=weight)
        loss = mean(losses, self.shares(weight))
        self.log("train/loss", loss.detach())
        return loss

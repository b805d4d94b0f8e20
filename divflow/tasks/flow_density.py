"""What tasks share whose density is a flow: validation and test by its exact likelihood, however it is trained."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.bases import MeanFreeNormal
from divflow.data.module import Batch, split_context
from divflow.density import FlowDensity
from divflow.divergence import check_field
from divflow.flow import ContinuousFlow
from divflow.tasks.reweighting import reweighted
from divflow.tasks.task import Task
from divflow.transforms import Affine

__all__ = ["FlowDensityTask"]


class FlowDensityTask(Task):
    """A flow that is trained, and judged by its log-density. A subclass implements `loss` and `check`.

    Args:
        flow: what is trained and saved: a flow, or a `FlowDensity`, which adds the data's transform to it.
        optimizer: function of the parameters that makes the optimizer.
        scheduler: function of the optimizer that makes a learning rate schedule, or None.
        evaluation: the flow that judges in validation and test, which shares the trained one's velocity; the trained
            one itself if None.
        config: a plain dict to save in each checkpoint, from which `divflow.load` rebuilds the density.
    """

    density: FlowDensity

    def __init__(
        self,
        flow: ContinuousFlow | FlowDensity,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        evaluation: ContinuousFlow | None,
        config: dict[str, Any] | None,
    ) -> None:
        super().__init__(
            flow if isinstance(flow, FlowDensity) else FlowDensity(flow, Affine()), optimizer, scheduler, config
        )
        # In a tuple, so that it is no submodule: it shares the trained flow's parameters.
        self._evaluation = (self.density.flow if evaluation is None else evaluation,)

    @property
    def judged(self) -> FlowDensity:
        """The density as validation and test evaluate it."""
        return self.density.with_flow(self._evaluation[0])

    def judge(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """The log-density of a batch, and what is known of it."""
        return self.judge_likelihood(self.judged, batch)

    def check_judged(self, batch: Batch) -> None:
        """Before the first step, in evaluation mode: the velocity that is judged must hide no derivative."""
        flow, (x, context) = self.judged.flow, self.transformed(batch)
        check_field(flow.field(context), flow.times()[0], x, detached=flow.detached)

    def check_base(self, x: Tensor, context: Tensor | None) -> None:
        """Before the first step: the velocity must stay on the subspace that the base is a density on, if it is one.

        Raises:
            BaseError: it moves the centre of mass of particles.
        """
        flow = self.density.flow
        if isinstance(flow.base.distribution, MeanFreeNormal):
            flow.base.distribution.check_velocity(flow.field(context), flow.times()[0], x)

    def on_test_epoch_end(self) -> None:
        """Log the test averages, and where the data have an energy, what weighted samples say of it."""
        super().on_test_epoch_end()
        data, estimator = self.data, self.judged.flow.estimator
        if data is None or data.energy is None:
            return
        if estimator.estimates:
            warnings.warn(
                f"samples are not weighted towards the energy, since {estimator} estimates the divergence; their weights need an exact "
                "one: estimator@evaluation.estimator=exact",
                stacklevel=2,
            )
            return
        for name, value in reweighted(self.judged, data, Generator(self.device).manual_seed(0)).items():
            self.log(f"test/{name}", value)

    @torch.no_grad()
    def transformed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the flow models, T(x) of the data x of a batch, and their context, in the flow's dtype."""
        x, context = split_context(batch)
        y, _ = self.density.transform(x, values=False)
        dtype = self.density.dtype
        context = self.density.flow_context(context)
        return y.to(dtype), None if context is None else context.to(dtype)

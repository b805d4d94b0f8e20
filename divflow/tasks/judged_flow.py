"""What tasks share whose density is a flow: validation and test by its exact likelihood, however it is trained."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from divflow.data.batch import Batch, Keys
from divflow.distributions import OnSubspace
from divflow.divergence import FieldError, check_field
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine
from divflow.operators.context import Context
from divflow.tasks.reweighting import reweighted
from divflow.tasks.task import Task

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
        monitor: the validation's value that `ReduceLROnPlateau` follows; `val/nll` if None.
        keys: where the parts of a batch are (`parts_of`).
    """

    density: FlowDensity

    def __init__(
        self,
        flow: ContinuousFlow | FlowDensity,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        evaluation: ContinuousFlow | None,
        config: dict[str, Any] | None,
        monitor: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        density = flow if isinstance(flow, FlowDensity) else FlowDensity(flow, Affine())
        super().__init__(density, optimizer, scheduler, config, monitor, keys)
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

    def check_base(self, x: Tensor, context: Context | None) -> None:
        """Before the first step: the velocity must stay on the subspace that the base is a density on, if it is one.

        Raises:
            BaseError: it leaves it, such as by moving the centre of mass of particles.
        """
        flow = self.density.flow
        if isinstance(base := flow.base.distribution, OnSubspace):
            base.check_velocity(flow.field(context), flow.times()[0], x)

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
    def transformed(self, batch: Batch) -> tuple[Tensor, Context | None]:
        """What the flow models, T(x) of the data x of a batch, and their context, both as the flow takes them."""
        x, context, _ = self.parts(batch)
        y, _ = self.density.transform(x, values=False)
        return y.to(self.density.dtype), self.density.flow_context(context)

    def checked(self, batch: Batch) -> tuple[Tensor, Context | None]:
        """Before the first step: `transformed`, of batches with a context only if the velocity takes one.

        Raises:
            FieldError: it does not, or needs one and there is none.
        """
        x, context = self.transformed(batch)
        velocity = self.density.flow.velocity
        call = velocity.forward if isinstance(velocity, nn.Module) else velocity
        try:
            signature = inspect.signature(call)
        except ValueError:  # a built-in function has no signature
            return x, context
        as_given, otherwise = ((0.0, x), (0.0, x, context))[:: -1 if context is not None else 1]
        if error := _refusal(signature, as_given):
            shown = f"v(t, x{', context' if context is not None else ''})"
            if _refusal(signature, otherwise):
                raise FieldError(
                    f"the velocity, a {type(velocity).__name__}, can't be called as {shown} ({error}): its arguments are the time, the state, "
                    "and a context where there is one"
                )
            told = "have a context" if context is not None else "have none"
            raise FieldError(
                f"the velocity can't be called as {shown}, but the batches {told} ({error}): leave "
                "out what is no context by keys={'x': 0}, or say what is one by keys={'x': 0, 'context': 1}, the keys or places of a batch"
            )
        return x, context


def _refusal(signature: inspect.Signature, arguments: tuple[object, ...]) -> str:
    """Why a call with these arguments is not one of that signature; empty if it is."""
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return str(error)
    return ""

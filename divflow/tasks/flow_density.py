"""Base of tasks whose density is a flow: validation and test by its exact likelihood, whatever the training."""

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
from divflow.manifolds import TangentField
from divflow.operators.context import Context
from divflow.tasks.reweighting import reweighted
from divflow.tasks.task import Task

__all__ = ["FlowDensityTask"]


class FlowDensityTask(Task):
    """Base of tasks that train a flow; validation and test evaluate its log-density.

    A subclass implements `loss` and `check`.

    Args:
        flow: flow that is trained and saved, or a `FlowDensity`, which adds the transform of the data to it.
        optimizer: function of the parameters that returns the optimizer.
        scheduler: function of the optimizer that returns a learning rate schedule; None for none.
        evaluation: flow that validation and test evaluate. It shares the velocity of the trained flow; that flow itself if None.
        config: plain dict that is saved in each checkpoint, from which `divflow.load` rebuilds the density.
        monitor: name of the validation value that `ReduceLROnPlateau` follows; `val/nll` if None.
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
    def evaluated_density(self) -> FlowDensity:
        """Density that validation and test evaluate."""
        return self.density.with_flow(self._evaluation[0])

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        """Evaluate the log-density of a batch, with its errors and costs (see `likelihood_values`)."""
        return self.likelihood_values(self.evaluated_density, batch)

    def check_evaluation(self, batch: Batch) -> None:
        """Check the velocity in evaluation mode, before the first step: autograd must see all of its derivatives.

        Raises:
            FieldError: autograd does not see all of them.
        """
        flow, (x, context) = self.evaluated_density.flow, self.transformed(batch)
        check_field(flow.field(context), flow.times()[0], x, detached=flow.detached)

    def check_base(self, x: Tensor, context: Context | None) -> None:
        """Check, before the first step, that the velocity stays on the subspace of the base, if the base has one.

        Raises:
            BaseError: it leaves the subspace, for example by moving the centre of mass of particles.
        """
        flow = self.density.flow
        if isinstance(base := flow.base.distribution, OnSubspace):
            base.check_velocity(flow.field(context), flow.times()[0], x)

    def on_test_epoch_end(self) -> None:
        """Log the test averages and, if the data have an energy, the estimates of weighted samples."""
        super().on_test_epoch_end()
        data, estimator = self.data, self.evaluated_density.flow.estimator
        if data is None or data.energy is None:
            return
        if estimator.estimates:
            warnings.warn(
                f"samples are not weighted towards the energy, because {estimator} estimates the divergence. Use an exact divergence, "
                "estimator@evaluation.estimator=exact",
                stacklevel=2,
            )
            return
        for name, value in reweighted(self.evaluated_density, data, Generator(self.device).manual_seed(0)).items():
            self.log(f"test/{name}", value)

    @torch.no_grad()
    def transformed(self, batch: Batch) -> tuple[Tensor, Context | None]:
        """Transform a batch x to what the flow models, T(x), with the context as the flow takes it."""
        x, context, _ = self.parts(batch)
        y, _ = self.density.transform(x, values=False)
        return y.to(self.density.dtype), self.density.flow_context(context)

    def checked(self, batch: Batch) -> tuple[Tensor, Context | None]:
        """Return `transformed`, after a check that the velocity takes a context if and only if the batch has one.

        Raises:
            FieldError: the velocity takes no context but the batch has one, or the other way round.
        """
        x, context = self.transformed(batch)
        velocity = self.density.flow.velocity
        velocity = velocity.field if isinstance(velocity, TangentField) else velocity
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
            have = "have a context" if context is not None else "have none"
            raise FieldError(
                f"the velocity can't be called as {shown}, but the batches {have} ({error}). Leave "
                "out what is no context by keys={'x': 0}, or name the context by keys={'x': 0, 'context': 1}, the keys or places of a batch"
            )
        return x, context


def _refusal(signature: inspect.Signature, arguments: tuple[object, ...]) -> str:
    """Why a call with these arguments is not one of that signature; empty if it is."""
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return str(error)
    return ""

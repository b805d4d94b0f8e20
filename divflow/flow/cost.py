"""The expected cost of evaluating a flow's log-density."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.divergence import Autograd, Exact, Hutchinson
from divflow.flow.continuous import ContinuousFlow
from divflow.operators.context import Context, context_rows
from divflow.operators.field import Field, event_size

__all__ = ["Cost", "evaluation_cost"]

# Forward passes up to which a divergence is timed directly, and not estimated from the plan.
_TIMED = 32
# Evaluations of the divergence that few batches exceed.
_MANY = 500


class Cost(NamedTuple):
    """The expected cost of one batch.

    Attributes:
        seconds: that it is expected to take.
        divergences: evaluations of the divergence.
        passes: cost of each in forward passes; None if one was timed.
        why: the plan's reason.
    """

    seconds: float
    divergences: int
    passes: float | None
    why: str


@torch.no_grad()
def evaluation_cost(flow: ContinuousFlow, x: Tensor, context: Context = None, least: float = 0.0) -> Cost | None:
    """Estimate the cost of `flow.evaluate(x, context)` with its error estimates; None if it takes less than `least` seconds.

    The number of field evaluations is counted on two samples, with one probe in place of the estimator. Their time is
    measured on the whole batch or, if that would take long, computed from the plan and the time of the velocity alone. A
    network that is trained further may need more.

    Args:
        flow: to be evaluated.
        x: a batch `(k, *event)`, k > 0.
        context: one row per sample.
        least: seconds below which no estimate is needed.

    Raises:
        FieldError: as `evaluate`.
        SolverError: as `evaluate`.
    """
    field, t = flow.field(context), x.new_tensor(flow.times()[0])
    velocity = _seconds(lambda: field(t, x), x)
    if velocity * _MANY * (1 + event_size(x)) < least:
        return None
    few = context_rows(context, slice(2))
    generator = Generator(x.device).manual_seed(0)
    one_probe = Hutchinson() if flow.estimator.stochastic else Hutchinson().freeze(x[:2], generator)
    counts = flow.replace(estimator=one_probe).evaluate(x[:2], few, generator).evaluations
    # Errors of the trajectory take another trajectory, by steps of half the length, with as many nodes on it.
    again = counts.divergence if counts.diagnostics else 0
    velocities, divergences = counts.forward + max(0, counts.diagnostics - again), counts.divergence + again
    passes, why = _passes(flow, flow.field(few), x[:2])
    if passes is None or passes <= _TIMED:
        passes, divergence = None, _seconds(lambda: flow.estimator(field, t, x, generator), x)
    else:
        divergence = passes * velocity
    return Cost(velocities * velocity + divergences * divergence, divergences, passes, why)


def _passes(flow: ContinuousFlow, field: Field, x: Tensor) -> tuple[float | None, str]:
    """The cost of a divergence in forward passes, and why; None if it is not known beforehand."""
    if isinstance(flow.estimator, Exact):
        plan = flow.estimator.explain(field, flow.times()[0], x)
        return plan.cost_in_forward_passes, plan.why
    if isinstance(flow.estimator, Autograd):
        return 1.0 + event_size(x), "one product a dimension"
    return None, ""


def _seconds(evaluate: Callable[[], object], x: Tensor) -> float:
    """The shorter of two times; the first may include preparations."""
    taken = []
    for _ in range(2):
        _wait_for(x)
        started = time.perf_counter()
        evaluate()
        _wait_for(x)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _wait_for(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)

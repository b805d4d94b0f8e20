"""The time that an evaluation of a density takes: reported before it begins, and limited."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from divflow.errors import DivflowError
from divflow.flow.cost import Cost, evaluation_cost
from divflow.flow.data_density import FlowDensity
from divflow.operators.context import Context
from divflow.operators.progress import watched

__all__ = ["EvaluationTimeError", "expect", "limited"]

# A shorter evaluation is not reported.
_SAID = 60.0


class EvaluationTimeError(DivflowError, RuntimeError):
    """An evaluation takes more time than its limit."""


def expect(
    density: FlowDensity,
    x: Tensor,
    context: Context,
    rows: int,
    what: str,
    max_minutes: float | None,
    remedy: str,
    setting: str = "max_minutes",
) -> str | None:
    """Report the time that an evaluation will take, if it is more than a minute.

    Args:
        density: to be evaluated.
        x: one batch of its data.
        context: of the batch.
        rows: of all batches that this process evaluates.
        what: is evaluated, for the message.
        max_minutes: the limit; None for none.
        remedy: what makes it cheaper.
        setting: the name of the limit.

    Returns:
        The message, or None.

    Raises:
        EvaluationTimeError: it would take more than the limit.
    """
    if not len(x) or not rows:
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        try:
            y, _ = density.transform(x, values=False)
            least = _SAID * len(x) / rows
            cost = evaluation_cost(density.flow, y.to(density.dtype), density.flow_context(context), least)
        except Exception:  # an error of the field, which the evaluation itself will raise
            return None
    if cost is None or (seconds := cost.seconds * rows / len(x)) < _SAID:
        return None
    said = (
        f"{what} will take some {_worded(seconds)}: {rows} rows in batches of {len(x)}, {_of(cost, density)}. {remedy}"
    )
    if max_minutes is not None and seconds > 60 * max_minutes:
        raise EvaluationTimeError(f"{said}. The limit is {setting}={max_minutes:g}; null is none")
    return said


@contextlib.contextmanager
def limited(max_minutes: float | None, what: str, remedy: str, setting: str = "max_minutes") -> Iterator[None]:
    """End an evaluation inside when its time is over.

    Args:
        max_minutes: the limit; None for none.
        what: is evaluated, for the message.
        remedy: what makes it cheaper.
        setting: the name of the limit.

    Raises:
        EvaluationTimeError: its time is over.
    """
    if max_minutes is None:
        yield
        return
    began = time.monotonic()

    def stop_when_over(counted: str, done: int, total: int) -> None:
        if time.monotonic() - began > 60 * max_minutes:
            raise EvaluationTimeError(
                f"{what} has taken more than {setting}={max_minutes:g} and is not done; null is no limit. {remedy}"
            )

    with watched(stop_when_over):
        yield


def _of(cost: Cost, density: FlowDensity) -> str:
    passes = "" if cost.passes is None else f", each worth {cost.passes:.0f} evaluations of the velocity ({cost.why})"
    return f"each with {cost.divergences} divergences by {density.flow.estimator}{passes}"


def _worded(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"

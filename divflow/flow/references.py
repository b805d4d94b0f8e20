"""Trajectories of given samples of a flow's data, along which an estimator is prepared."""

from typing import Protocol

from torch import Tensor

from divflow.errors import FieldError
from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.operators.context import Context

__all__ = ["trajectories"]

# Times at which an estimator is prepared along a flow: fifteen nodes.
_TIMES = 15


class _Solved(Protocol):
    """A flow."""

    t_data: float | Tensor

    def times(self) -> tuple[float, float]:
        """t_base and t_data."""

    def trajectory(self, x: Tensor, times: list[float | Tensor]) -> Tensor:
        """The states at some times."""


def trajectories(flow: _Solved, context: Context | None, references: Tensor) -> tuple[Tensor, Tensor]:
    """Return increasing times `(n,)` between a flow's ends, and the states of reference samples there, `(n, r, *event)`.

    Args:
        flow: without a context.
        context: None.
        references: samples of the flow's data, `(r, *event)`.

    Raises:
        FieldError: the flow has a context.
    """
    if context is not None:
        raise FieldError(
            "given reference samples need contexts of their own, which the estimator of a conditional flow can't carry. "
            "Take the references from the batch instead: ControlVariate(Hutchinson(), references=16)."
        )
    start, end = sorted(flow.times())
    times = [start + (end - start) * node for node in gauss_kronrod(_TIMES).nodes.tolist()]
    backwards = flow.times()[1] == end
    ordered = times[::-1] if backwards else times
    states = flow.trajectory(references, [flow.t_data, *ordered])[1:]
    return references.new_tensor(times), states.flip(0) if backwards else states

"""What surrounds a flow's solve: its two times, a mode in which estimators can differentiate, and the rows where it fails."""

import contextlib
import math
from collections.abc import Callable, Iterator
from numbers import Real

import torch
from torch import Tensor

from divflow.errors import listed_rows
from divflow.flow.rows import check_finite_rows
from divflow.operators.context import Context, named_tensors
from divflow.operators.field import flatten_event
from divflow.solver import Solver, SolverError

__all__ = ["as_number", "as_scalar", "check_reached", "check_times", "explained", "outside_inference_mode"]

# The share of the way by which an end that the velocity has no value at is moved, and by how much a state grows that is lost.
_INWARDS, _LOST = 1e-3, 1e6


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, in which estimators could not differentiate; no graph is kept all the same."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextlib.contextmanager
def explained(x: Tensor, context: Context | None, times: Callable[[], tuple[float, float]]) -> Iterator[None]:
    """Where a solve fails, say which rows are not finite, or which of the flow's times is none of the velocity's.

    Values are not read before, for which the host would wait.

    Args:
        x: rows.
        context: theirs.
        times: t_base and t_data, when they are asked for.
    """
    try:
        yield
    except SolverError as error:
        check_finite_rows(x)
        for place, leaf in named_tensors(context):
            check_finite_rows(leaf, place)
        if (singular := error.singular) is None:
            raise
        base, data = times()
        name, end, other = (
            ("t_base", base, data) if abs(base - singular) < abs(data - singular) else ("t_data", data, base)
        )
        raise SolverError(
            f"the velocity is not finite at t = {end:g}, the flow's {name}, where it may be divided by zero as in 1 / (1 - t); let the "
            f"flow end a little before, by {name}={end + _INWARDS * (other - end):g}"
        ) from error


def check_reached(solver: Solver, x: Tensor, state: Tensor, log_base: Tensor) -> None:
    """Refuse log-densities of -inf that steps of a fixed length have made, by leaving every bound: too long for a stiff velocity.

    Args:
        solver: of the trajectory.
        x: where it began, `(k, *event)`.
        state: where it led.
        log_base: the base's log-density there, `(k,)`.

    Raises:
        SolverError: naming the row and the remedy.
    """
    if solver.adaptive or x.numel() == 0:
        return
    sizes = [flatten_event(part.detach()).abs().amax(dim=1) for part in (x, state)]
    lost = log_base.detach().isneginf() & (sizes[1] > _LOST * (1 + sizes[0]))
    if lost.any():
        raise SolverError(
            f"the trajectory grows from at most {sizes[0][lost].max():.3g} to {sizes[1][lost].max():.3g} ({listed_rows(lost)}), where "
            f"the base has no density: the velocity is stiff, and steps of this length too long for {solver.method}. Take more of "
            "them, by a smaller step_size, or an adaptive method, such as dopri5"
        )


def check_times(t_base: float | Tensor, t_data: float | Tensor) -> None:
    """Refuse two times that are no numbers, or one and the same.

    Raises:
        ValueError: naming them.
    """
    if as_number(t_base) == as_number(t_data):
        raise ValueError(f"t_base and t_data must differ, but both are {t_base}")


def as_number(t: float | Tensor) -> float:
    """One of a flow's two times as a finite number."""
    if not isinstance(t, Real) and not (isinstance(t, Tensor) and t.numel() == 1):
        raise ValueError(f"t_base and t_data must be numbers, or tensors of one, but one of them is {t!r}")
    number = t.item() if isinstance(t, Tensor) else float(t)
    if not math.isfinite(number):
        raise ValueError(f"t_base and t_data must be finite, but one of them is {t!r}")
    return number


def as_scalar(t: float | Tensor, x: Tensor) -> Tensor:
    """A time as a scalar of x's dtype, on its device."""
    if isinstance(t, Tensor):
        return t.to(x).reshape(())
    return x.new_full((), t)  # filled there; a tensor made here would have to be copied, for which the host waits

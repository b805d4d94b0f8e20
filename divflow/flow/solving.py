"""What surrounds a flow's solve: its two times, a mode in which estimators can differentiate, and the rows that fail."""

import contextlib
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from divflow.errors import FieldError, listed_rows
from divflow.flow.rows import check_finite_rows
from divflow.operators.context import Context, named_tensors
from divflow.operators.differentiating import evaluated
from divflow.operators.field import Field, flatten_event
from divflow.solver import Solver, SolverError
from divflow.verification.noise import noisy_modules
from divflow.verification.seeded import seeded

__all__ = [
    "as_number",
    "as_scalar",
    "check_noise",
    "check_reached",
    "check_times",
    "explained",
    "outside_inference_mode",
]

# The fraction of the way by which a singular end is moved, and the growth at which a state counts as lost.
_INWARDS, _LOST = 1e-3, 1e6


class _Flow(Protocol):
    velocity: Callable[..., Tensor]

    def times(self) -> tuple[float, float]: ...


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, in which estimators can't differentiate; no graph is kept."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextlib.contextmanager
def explained(x: Tensor, context: Context | None, flow: _Flow) -> Iterator[None]:
    """Explain a failed solve: which rows are not finite, where the velocity is singular, or which modules make it noisy.

    Values are not read before a failure, because the host would wait for them.

    Args:
        x: rows.
        context: theirs.
        flow: the flow.
    """
    try:
        yield
    except SolverError as error:
        check_finite_rows(x)
        for place, leaf in named_tensors(context):
            check_finite_rows(leaf, place)
        if (singular := error.singular) is None:
            if noisy := noisy_modules(flow.velocity):
                raise SolverError(f"{error} {_noise(noisy)}") from error
            raise
        base, data = flow.times()
        name, end, other = (
            ("t_base", base, data) if abs(base - singular) < abs(data - singular) else ("t_data", data, base)
        )
        raise SolverError(
            f"the velocity is not finite at t = {end:g}, the flow's {name}, where it may divide by zero as in 1 / (1 - t). End the flow "
            f"a little before, by {name}={end + _INWARDS * (other - end):g}."
        ) from error


@torch.no_grad()
def check_noise(field: Field, t: float, x: Tensor, solver: Solver, velocity: Callable[..., Tensor]) -> None:
    """Refuse a velocity whose values are random, which an adaptive solver would follow in ever smaller steps.

    Args:
        field: the velocity with its context bound.
        t: a time.
        x: states `(k, *event)`.
        solver: that will integrate it.
        velocity: the function or module, for the message.

    Raises:
        FieldError: with the modules that draw random numbers, and the remedy.
    """
    if not solver.adaptive or x.numel() == 0:
        return
    values = []
    for seed in (0, 1):
        with seeded(seed, [x.device] if x.is_cuda else []):
            values.append(evaluated(field, x.new_full((), t), x.clone()))
    difference = (values[0] - values[1]).abs().max()
    if difference > values[0].abs().max() * torch.finfo(x.dtype).eps ** 0.5:
        raise FieldError(
            f"the velocity is random: at one time and state its values differ by {float(difference):.2g}. "
            f"{_noise(noisy_modules(velocity) or 'a function within it')}"
        )


def _noise(noisy: str) -> str:
    return (
        f"An adaptive solver follows the random numbers of {noisy} in ever smaller steps. Use p=0 or eval mode there, or train by flow "
        "matching (task=flow_matching), which solves nothing in training."
    )


def check_reached(solver: Solver, x: Tensor, state: Tensor, log_base: Tensor) -> None:
    """Refuse log-densities of -inf from fixed steps that are too long for a stiff velocity and diverged.

    Args:
        solver: of the trajectory.
        x: where it began, `(k, *event)`.
        state: where it led.
        log_base: the base's log-density there, `(k,)`.

    Raises:
        SolverError: with the row and the remedy.
    """
    if solver.adaptive or x.numel() == 0:
        return
    sizes = [flatten_event(part.detach()).abs().amax(dim=1) for part in (x, state)]
    lost = log_base.detach().isneginf() & (sizes[1] > _LOST * (1 + sizes[0]))
    if lost.any():
        raise SolverError(
            f"the trajectory grows from at most {sizes[0][lost].max():.3g} to {sizes[1][lost].max():.3g} ({listed_rows(lost)}), where "
            f"the base has no density: the velocity is stiff, and the steps of {solver.method} are too long for it. Take more steps, by "
            "a smaller step_size, or an adaptive method, such as dopri5."
        )


def check_times(t_base: float | Tensor, t_data: float | Tensor) -> None:
    """Refuse two times that are not numbers, or equal.

    Args:
        t_base: time of the base.
        t_data: time of the data.

    Raises:
        ValueError: with the times.
    """
    if as_number(t_base) == as_number(t_data):
        raise ValueError(f"t_base and t_data must differ, but both are {t_base}")


def as_number(t: float | Tensor) -> float:
    """Return one of a flow's two times as a finite number.

    Args:
        t: a number, or a tensor of one.
    """
    if not isinstance(t, Real) and not (isinstance(t, Tensor) and t.numel() == 1):
        raise ValueError(f"t_base and t_data must be numbers, or tensors with one number, but one of them is {t!r}")
    number = t.item() if isinstance(t, Tensor) else float(t)
    if not math.isfinite(number):
        raise ValueError(f"t_base and t_data must be finite, but one of them is {t!r}")
    return number


def as_scalar(t: float | Tensor, x: Tensor) -> Tensor:
    """Return a time as a scalar of x's dtype, on its device.

    Args:
        t: a number, or a tensor of one.
        x: states.
    """
    if isinstance(t, Tensor):
        return t.to(x).reshape(())
    return x.new_full((), t)  # filled on the device, because the host would wait for a copy

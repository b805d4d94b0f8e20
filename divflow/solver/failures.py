"""Why a trajectory could not be computed, in words, and where its velocity is not finite."""

import contextlib
import warnings
from collections.abc import Iterator

from torch import Tensor

from divflow.errors import DivflowError

__all__ = ["SolverError", "Unconverged", "described", "explained", "unconverged_is_an_error"]

_BLOWS_UP = "gradient clipping, smooth activations or scaled data if it blows up."
_REMEDY = (
    "Try a looser tolerance or a smaller learning rate if the field is stiff, a larger max_evaluations or a fixed-step method if it is "
    f"only expensive, and {_BLOWS_UP}"
)
_REMEDY_FIXED = f"Try more steps (a smaller step_size) or an adaptive method if the field is stiff, and {_BLOWS_UP}"


class SolverError(DivflowError, RuntimeError):
    """A trajectory could not be computed; the message has the time, the tolerance, and what to try.

    Attributes:
        singular: the first or the last time of the solve, if the velocity is not finite there; else None.
    """

    singular: float | None = None


def described(what: str, time: Tensor | None, by: str, fixed: bool, adjoint: bool) -> str:
    """Describe a failure as a message.

    Args:
        what: happened.
        time: at which the last step began.
        by: the method and its tolerances.
        fixed: whether the method's steps have a fixed length.
        adjoint: whether the adjoint was being solved.
    """
    where = "" if time is None else f" at t = {float(time):.6g}"
    return (
        f"the {'adjoint ' if adjoint else ''}solve failed{where}: {what} ({by}). {_REMEDY_FIXED if fixed else _REMEDY}"
    )


def explained(error: SolverError, finite: list[tuple[float, bool]]) -> SolverError:
    """Return the error, or its cause: a velocity that is not finite at the first time, the last time or everywhere.

    Args:
        error: as it was raised.
        finite: the first time, one between and the last, each with whether the velocity of the initial state is finite.
    """
    if not any(there for _, there in finite):
        return SolverError(
            f"the solve failed: the velocity is not finite at {', '.join(f't = {t:g}' for t, _ in finite)}. Look for NaN in its weights, "
            "the data or their context, or for numbers so large that they overflow."
        )
    for t, there in (finite[0], finite[-1]):
        if not there:
            cause = SolverError(
                f"the solve failed: the velocity is not finite at t = {t:g}, where it may divide by zero as in 1 / (1 - t). Start or "
                "end a little before."
            )
            cause.singular = t
            return cause
    return error


class Unconverged(UserWarning):
    """Torchdiffeq's warning "Functional iteration did not converge. Solution may be incorrect." as an exception class."""


@contextlib.contextmanager
def unconverged_is_an_error() -> Iterator[None]:
    """Raise that warning as an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Functional iteration did not converge")
        try:
            yield
        except UserWarning as warning:
            if "Functional iteration" not in str(warning):
                raise
            raise Unconverged(str(warning)) from warning

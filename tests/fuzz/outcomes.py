"""What a generated call may end in, and a limit on its time."""

import contextlib
import enum
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import divflow
from divflow.errors import DivflowError

__all__ = ["Fault", "Outcome", "is_typed", "limit"]


class Outcome(enum.Enum):
    """Of one call; the last three are faults."""

    EQUAL = "equal"
    TYPED = "typed error"
    UNCOMPARED = "not compared"
    SILENT = "silent difference"
    OTHER = "other exception"
    HANG = "hang"


class Fault(AssertionError):
    """A number that is silently another, an error without a type, or a call that does not end."""

    def __init__(self, message: str, outcome: Outcome = Outcome.SILENT) -> None:
        super().__init__(message)
        self.outcome = outcome


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """A call that takes longer hangs; only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def alarm(*_: object) -> None:
        raise Fault(f"a call took longer than {seconds} s", Outcome.HANG)

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_typed(error: Exception) -> bool:
    """One of divflow's own, or a TypeError or ValueError that divflow raised, or the call itself, not a line deep inside."""
    if isinstance(error, DivflowError):
        return True
    if not isinstance(error, (TypeError, ValueError)):
        return False
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    raised, package = Path(frames[-1].co_filename), Path(divflow.__file__).parent
    # What Python says of a call with arguments missing is raised where that call is, in the test.
    by_call = isinstance(error, TypeError) and raised.parent == Path(__file__).parent and "argument" in str(error)
    return by_call or (package in raised.parents and not _accidental(error))


def _accidental(error: Exception) -> bool:
    """Whether Python raised it of itself, on a line of divflow: it names an operation, not an argument."""
    accidents = ("unsupported operand", "not supported between", "has no len", "could not convert",
                 "must be real number", "must be called with", "can only", "invalid literal", "has no attribute")  # fmt: skip
    return any(accident in str(error) for accident in accidents)

"""Signals of a scheduler outside of training: they end the command with an exit code of its own."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

__all__ = ["Stopped", "alone", "exit_code", "heard"]

# SIGTERM ends a job, and a scheduler's SIGUSR1 announces that; runs resume alike from both.
_STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


# Signals that this module has answered: what they raise, a library may swallow.
_ANSWERED: list[int] = []


class Stopped(SystemExit):
    """A signal ended the command."""


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within this context SIGTERM and SIGUSR1 raise `Stopped` wherever the program is, as Ctrl-C raises KeyboardInterrupt.

    In training, `divflow.callbacks.Processes` handles signals instead.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    _ANSWERED.clear()
    before = {number: signal.signal(number, _stop) for number in _STOPPING}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this context a stop that an import or a library has turned into another error stays a stop."""
    try:
        yield
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, Stopped | KeyboardInterrupt):
            behind = behind.__cause__ or behind.__context__
        if behind is None and _ANSWERED:
            behind = KeyboardInterrupt() if _ANSWERED[0] == signal.SIGINT else Stopped(143)
        if behind is None:
            raise
        raise behind from None


def exit_code(stop: SystemExit) -> int:
    """Exit code: 143 after a signal, which this module or Lightning handled; 130 after Ctrl-C, which Lightning ends with 1."""
    return 143 if type(stop) is not SystemExit else 130


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _ANSWERED.append(number)
    raise Stopped(143)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _ANSWERED.append(number)
    raise KeyboardInterrupt

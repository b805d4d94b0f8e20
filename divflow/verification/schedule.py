"""When a call of a field is verified: at calls 1, 2, 4, 8, ... of its code, and as long as something is wrong with it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from divflow.verification.kept import Plans, kin

__all__ = ["Record", "answer", "due", "record_of", "severed_fields", "verifying"]

Answer = Literal["warn", "refuse", "allow"]

_ANSWER: ContextVar[Answer] = ContextVar("divflow_severed_fields", default="warn")


@contextmanager
def severed_fields(answer: Answer) -> Iterator[None]:
    """Within it, a field of which autograd does not know all gets a warning, is refused, or is meant to be so.

    Args:
        answer: "warn" is what a bare divergence does, "refuse" what flows and tasks do, and "allow" is for a field that
            means what it detaches.
    """
    token = _ANSWER.set(answer)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def answer() -> Answer:
    """What a field that is severed gets."""
    return _ANSWER.get()


class Record:
    """What is known of a field from the calls that were verified.

    Attributes:
        calls: how many there were.
        wrong: whether the last one that was verified was refused or warned of; then the next one is verified, too.
        warned: whether a warning was given.
        right: how often a field that is suspect for a reason was found to be right.
        note: what could not be verified, and why, for `explain`.
    """

    def __init__(self) -> None:
        self.calls, self.wrong, self.warned = 0, False, False
        self.right: dict[str, int] = {}
        self.note = ""

    def due(self) -> bool:
        """Count a call, and say whether it is verified."""
        self.calls += 1
        return self.wrong or self.calls & (self.calls - 1) == 0


_RECORDS: Plans[Record] = Plans(size=1024)
_VERIFYING = threading.local()


def record_of(g: Callable[[Tensor], object], x: Tensor) -> Record:
    """The record of a function of the state in the circumstances that what it does may depend on, kept for as long as it lives."""
    device, few = x.device.type, len(x) if len(x) < 2 else 2
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    circumstances = few, x.shape[1:], x.dtype, device, autocast, torch.is_grad_enabled()
    relatives = kin(g)
    record = _RECORDS.get(relatives, *circumstances)
    if record is None:
        record = Record()
        _RECORDS.keep(record, relatives, *circumstances)
    return record


def due(g: Callable[[Tensor], object], x: Tensor) -> Record | None:
    """The record of a function whose call is to be verified, or None.

    None, too, where a field is evaluated in order to verify it, and within transforms of torch.func, where there are no
    numbers to look at.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if (
        x.ndim == 0
        or x.numel() == 0
        or transformed
        or getattr(_VERIFYING, "now", False)
        or torch.compiler.is_compiling()
    ):
        return None
    record = record_of(g, x)
    return record if record.due() else None


@contextmanager
def verifying() -> Iterator[None]:
    """Within it, no call is due: what is evaluated is evaluated in order to verify."""
    before = getattr(_VERIFYING, "now", False)
    _VERIFYING.now = True
    try:
        yield
    finally:
        _VERIFYING.now = before

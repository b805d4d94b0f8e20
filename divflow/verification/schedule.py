"""When a call of a field is verified: at calls 1, 2, 4, 8, ... of its code, and as long as something is wrong with it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from divflow.verification.kept import Plans, kin

__all__ = ["Record", "Schedule", "answer", "due", "record_of", "severed_fields", "verifying"]

Answer = Literal["warn", "refuse", "allow"]

_ANSWER: ContextVar[Answer] = ContextVar("divflow_severed_fields", default="warn")


@contextmanager
def severed_fields(answer: Answer) -> Iterator[None]:
    """Choose what happens to a field whose dependence on x autograd does not see completely.

    Args:
        answer: the reaction.

            - "warn": a warning, as of a bare divergence.
            - "refuse": an error, as in flows and tasks.
            - "allow": nothing, for a field that detaches on purpose.

    Example:
        >>> import torch
        >>> from divflow.divergence import divergence
        >>> with severed_fields("allow"):
        ...     divergence(lambda t, x: x.detach() * x, 0.0, torch.tensor([[2.0, 3.0]]))
        tensor([5.])
    """
    token = _ANSWER.set(answer)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def answer() -> Answer:
    """The present reaction to a severed field."""
    return _ANSWER.get()


class Schedule:
    """When a call is verified: calls 1, 2, 4, 8, ..., and the one after a surprise.

    Attributes:
        calls: how many there were.
    """

    def __init__(self) -> None:
        self.calls, self._surprised = 0, False

    def due(self) -> bool:
        """Count a call, and return whether it is verified."""
        self.calls += 1
        due = self._surprised or self.calls & (self.calls - 1) == 0
        self._surprised = False
        return due

    def surprise(self) -> None:
        """Note that something unverified was done."""
        self._surprised = True

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Wrap a verification: if it refuses, the next call is verified, too."""
        try:
            yield
        except BaseException:
            self.surprise()
            raise


class Record:
    """What is known of a field from its verified calls.

    Attributes:
        schedule: of its calls.
        wrong: whether the last verified call was refused or raised a warning; then the next one is verified, too.
        warned: whether a warning was raised.
        right: how often a field that is suspect for a reason was found to be right.
        note: what could not be verified, and why, for `explain`.
    """

    def __init__(self) -> None:
        self.schedule, self.wrong, self.warned = Schedule(), False, False
        self.right: dict[str, int] = {}
        self.note = ""

    def due(self) -> bool:
        """Count a call, and return whether it is verified."""
        return self.schedule.due() or self.wrong


_RECORDS: Plans[Record] = Plans(size=1024)
_VERIFYING = threading.local()


def record_of(g: Callable[[Tensor], object], x: Tensor) -> Record:
    """Return the record of a function in the conditions that its behaviour may depend on, kept for as long as it lives.

    Args:
        g: the function of the state.
        x: states `(k, *event)`.
    """
    device, few = x.device.type, len(x) if len(x) < 2 else 2
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    conditions = few, x.shape[1:], x.dtype, device, autocast, torch.is_grad_enabled()
    return _RECORDS.of(Record, kin(g), *conditions)


def due(g: Callable[[Tensor], object], x: Tensor) -> Record | None:
    """Return the record of a function whose call is to be verified, or None.

    It is also None during a verification, and inside transforms of torch.func, where no numbers can be read.

    Args:
        g: the function of the state.
        x: states `(k, *event)`.
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
    """Mark evaluations as part of a verification, so that none of them is due."""
    before = getattr(_VERIFYING, "now", False)
    _VERIFYING.now = True
    try:
        yield
    finally:
        _VERIFYING.now = before

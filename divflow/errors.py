"""Typed errors, and argument checks whose messages name the value received and the remedy.

All errors of divflow have a common root, so that one `except` separates them from bugs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands report what they refuse at once without importing torch, which takes a second
    from torch import Generator, Tensor

__all__ = [
    "DivflowError",
    "FieldError",
    "FieldWarning",
    "check_count",
    "check_generator",
    "check_numbers",
    "check_positive",
    "checked_event_shape",
    "checked_range",
    "listed_rows",
    "on_copies",
]


class DivflowError(Exception):
    """An error that a user can correct; its message names the value received and the remedy."""


class FieldError(DivflowError, ValueError):
    """A field or one of its arguments violates what the mathematics needs."""


class FieldWarning(UserWarning):
    """A field may violate what the mathematics needs; the message says what was observed and what to do."""


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a value that is not a whole number of at least `least`.

    Args:
        name: the option, for the message.
        value: what was received.
        least: the smallest value allowed.

    Raises:
        ValueError: with the option and the value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}")


def check_numbers(**values: float) -> None:
    """Refuse values that are not finite numbers.

    Args:
        **values: the numbers by the names of their options.

    Raises:
        ValueError: with the option and the value.
    """
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, but is {value!r}")


def check_positive(name: str, value: float) -> None:
    """Refuse a value that is not a positive, finite number.

    Args:
        name: the option, for the message.
        value: what was received.

    Raises:
        ValueError: with the option and the value.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number, but is {value!r}")


def check_generator(generator: "Generator | None") -> None:
    """Refuse anything but a generator or None, such as a seed.

    Args:
        generator: what was received.

    Raises:
        TypeError: with the value.
    """
    from torch import Generator

    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, but is {generator!r}. For a seed, use "
            "torch.Generator().manual_seed(seed)."
        )


def checked_event_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one sample as a tuple.

    Args:
        shape: the sizes, or an int for vectors.

    Raises:
        ValueError: with the value.
    """
    sizes: object = (shape,) if isinstance(shape, Integral) else shape
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise ValueError(f"event_shape must be an int or a sequence of ints, but is {shape!r}")
    for size in sizes:
        check_count("a size in event_shape", size, least=0)
    return tuple(int(size) for size in sizes)


def checked_range(name: str, ends: Sequence[float]) -> tuple[float, float]:
    """Return a range as two numbers, the lower one first.

    Args:
        name: the option, for the message.
        ends: the two numbers.

    Raises:
        ValueError: with the value.
    """
    try:
        if isinstance(ends, str):  # of which each letter may be a number
            raise TypeError
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and low < high < math.inf):
        raise ValueError(f"{name} must be a range (low, high), such as (-1, 1), but is {ends!r}")
    return low, high


def listed_rows(bad: "Tensor") -> str:
    """List the first rows where `bad` is true in words, such as `row 3, 4 of 10, counted from 0`.

    Args:
        bad: a mask `(n,)`.
    """
    rows = bad.nonzero().flatten().tolist()
    more = f" and {len(rows) - 10:,} more" if len(rows) > 10 else ""
    return f"row {', '.join(map(str, rows[:10]))}{more} of {len(bad):,}, counted from 0"


def on_copies(cls: type, *names: str) -> None:
    """Make the named methods of a class work on copies of the tensors that they receive.

    Args:
        cls: the class; only methods that it defines itself are changed.
        *names: the methods.
    """
    for name in names:
        method = vars(cls).get(name)
        if callable(method):
            setattr(cls, name, _on_copies(method))


def _on_copies(method: Callable[..., Any]) -> Callable[..., Any]:
    from torch import Tensor

    @functools.wraps(method)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        copies = [it.clone() if isinstance(it, Tensor) else it for it in (*given, *named.values())]
        return method(self, *copies[: len(given)], **dict(zip(named, copies[len(given) :], strict=True)))

    return call

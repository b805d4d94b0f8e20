"""Typed errors, and the checks of arguments that raise errors naming the value and the remedy.

divflow's own errors have a common root, so that one `except` can tell them from a bug.
"""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is refused at once by a command is told before torch is imported, which takes a second
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
    """Something a user can mend: the message names the value received and the remedy."""


class FieldError(DivflowError, ValueError):
    """A field or its arguments are not what the mathematics needs."""


class FieldWarning(UserWarning):
    """A field may not be what the mathematics needs: what was seen of it, and what to do."""


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ValueError: naming the option and the value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}")


def check_numbers(**values: float) -> None:
    """Refuse what is no finite number.

    Raises:
        ValueError: naming the option and the value.
    """
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, and finite, but is {value!r}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive, finite number.

    Raises:
        ValueError: naming the option and the value.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number, positive and finite, but is {value!r}")


def check_generator(generator: "Generator | None") -> None:
    """Refuse what is neither a generator nor None, such as a seed.

    Raises:
        TypeError: naming the value.
    """
    from torch import Generator

    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, but is {generator!r}; for a seed use "
            "torch.Generator().manual_seed(seed)"
        )


def checked_event_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample as a tuple; an int stands for vectors.

    Raises:
        ValueError: naming the value.
    """
    sizes: object = (shape,) if isinstance(shape, Integral) else shape
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise ValueError(f"event_shape must be an int or a sequence of ints, but is {shape!r}")
    for size in sizes:
        check_count("a size in event_shape", size, least=0)
    return tuple(int(size) for size in sizes)


def checked_range(name: str, ends: Sequence[float]) -> tuple[float, float]:
    """A range as two numbers, the lower one first.

    Raises:
        ValueError: naming the value.
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
    """The numbers of the first rows where `bad`, `(n,)`, is true, in words: `row 3, 4 of 10, counted from 0`."""
    rows = bad.nonzero().flatten().tolist()
    more = f" and {len(rows) - 10:,} more" if len(rows) > 10 else ""
    return f"row {', '.join(map(str, rows[:10]))}{more} of {len(bad):,}, counted from 0"


def on_copies(cls: type, *names: str) -> None:
    """Let the methods of these names that a class defines itself work on copies of the tensors that they are given."""
    for name in names:
        method = vars(cls).get(name)
        if callable(method):
            setattr(cls, name, _on_copies(method))


def _on_copies(method: Callable[..., Any]) -> Callable[..., Any]:
    from torch import Tensor

    @functools.wraps(method)
    def call(self: Any, *tensors: Any) -> Any:
        return method(self, *(it.clone() if isinstance(it, Tensor) else it for it in tensors))

    return call

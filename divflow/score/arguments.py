"""Numbers and shapes that options may be."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

__all__ = ["check_count", "check_positive", "checked_event_shape"]


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ValueError: naming the option and the value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive, finite number.

    Raises:
        ValueError: naming the option and the value.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number, positive and finite, but is {value!r}")


def checked_event_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample as a tuple; an int stands for vectors.

    Raises:
        ValueError: naming the value.
    """
    sizes = (shape,) if isinstance(shape, Integral) else shape
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise ValueError(f"event_shape must be an int or a sequence of ints, but is {shape!r}")
    for size in sizes:
        check_count("a size in event_shape", size, least=0)
    return tuple(int(size) for size in sizes)

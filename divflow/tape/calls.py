"""What registered functions call in place of their own code."""

from collections.abc import Callable
from typing import Any

__all__ = ["CALLS", "call"]

CALLS: dict[int, Callable[..., Any]] = {}
"""By the number that stands in a function's code."""


def call(number: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function as it was, or what a listener makes of it."""
    return CALLS[number](*args, **kwargs)

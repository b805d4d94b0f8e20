"""The one mode in which torch functions are seen: whoever wants to see them is told of each, and calls it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function

__all__ = ["Listener", "Listening", "overridable"]


class Listener(Protocol):
    """What is told of torch functions."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function, or what is to be called in its place, and return the result."""


class Listening(TorchFunctionMode):
    """While it is entered, a listener calls every torch function; those that it calls itself it is not told of.

    Args:
        listener: which; functions that it does not call are not evaluated.
    """

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the listener call it."""
        return self._listener.called(func, args, kwargs or {})


def overridable(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """What calls the original; while something is listening, it is told of the function instead, as of one of torch's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.overrides._is_torch_function_mode_enabled():
            return original(*args, **kwargs)
        tensors = tuple(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        return handle_torch_function(function, tensors, *args, **kwargs)

    return call

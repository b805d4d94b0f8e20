"""The one mode that sees torch functions: a listener sees each of them, and calls it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function

__all__ = ["Listener", "Listening", "overridable"]


class Listener(Protocol):
    """An object that sees torch functions."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function, or its replacement, and return the result."""


class Listening(TorchFunctionMode):
    """While it is entered, a listener calls every torch function; it does not see those that it calls itself.

    Args:
        listener: functions that it does not call are not evaluated.
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
    """Wrap the original so that a listener, if there is one, sees the function instead, as one of torch's.

    Args:
        function: what listeners see.
        original: what is called.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.overrides._is_torch_function_mode_enabled():
            return original(*args, **kwargs)
        tensors = tuple(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        return handle_torch_function(function, tensors, *args, **kwargs)

    return call

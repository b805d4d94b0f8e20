"""Inside torch.compile: derivatives of fields run eagerly, between the compiled parts."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["eagerly"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_WHY = (
    "divflow follows a field as it is evaluated, which can't be traced. Compile the step without fullgraph=True, or compile the "
    "network alone."
)


def eagerly(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap a function so that torch's compiler leaves it as it is and calls it between two graphs.

    Code that follows a field as it is evaluated, verifies it and remembers it can't be traced. The compiler is not loaded
    for this, as it would be by decorating with `torch.compiler.disable`.

    Args:
        function: the one to wrap.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    # The mark of torch.compiler.disable: if no graph may be broken, torch's error quotes this text.
    for name, value in {"_torchdynamo_disable": True, "_torchdynamo_disable_msg": _WHY}.items():
        setattr(call, name, value)
    return call

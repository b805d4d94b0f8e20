"""Within torch.compile: derivatives of fields run eagerly, between the parts that are compiled."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["eagerly"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_WHY = (
    "divflow follows a field as it is evaluated, which can't be traced: compile the step without fullgraph=True, or the network "
    "alone"
)


def eagerly(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which torch's compiler leaves as it is and calls between two graphs.

    What follows a field as it is evaluated, verifies it and remembers it, is not to be traced itself. The compiler is not
    loaded for it, as it would be by decorating with `torch.compiler.disable`.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    # As torch.compiler.disable marks what it returns: where no graph may be broken, this is what its error says.
    for name, value in {"_torchdynamo_disable": True, "_torchdynamo_disable_msg": _WHY}.items():
        setattr(call, name, value)
    return call

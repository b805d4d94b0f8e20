"""What users write into fields, once for all tests: steps of vectors and of images, whole networks, scalar functions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["TAGS", "D", "Written", "tagged", "written"]

D = 6
"""Entries of the vectors that networks and scalar functions take."""

TAGS = {
    "layered": "the layered method has a rule for each of its operations",
    "jets": "the forward Laplacian has a rule for each of its operations",
    "activation": "a module of torch's that acts on one entry at a time",
    "branching": "rounding may decide, which half precisions and float64 then do differently",
    "random": "draws noise",
    "stateful": "is another function from call to call",
    "severed": "autograd's derivative is another than that of its values",
    "joint": "what it does to a sample hangs on the others",
    "timed": "reads one of the times as a number",
    "full": "torch has no half precision of it, or it is another function there",
    "double": "it is another function in float32",
    "several": "needs several entries that are not all equal",
    "small": "takes a matrix of its size, or too long, of hundreds of entries",
    "once": "torch has no second derivative of it",
}


@dataclass(frozen=True)
class Written:
    """What somebody writes.

    Attributes:
        tags: what is true of it, of `TAGS`.
        function: a step's function of (piece, t, h), or what makes a network.
        layer: what makes the module that the step holds as `layer`, of its size.
    """

    tags: frozenset[str]
    function: Callable[..., Any]
    layer: Callable[[int], nn.Module] | None = None


def written(tags: str, function: Callable[..., Any], layer: Callable[[int], nn.Module] | None = None) -> Written:
    return Written(frozenset(tags.split()), function, layer)


def tagged(table: Mapping[str, Written], *tags: str, without: Iterable[str] = ()) -> list[str]:
    """The names of what has all of these tags, and none of the others."""
    return [
        name
        for name, entry in table.items()
        if entry.tags.issuperset(tags) and entry.tags.isdisjoint(frozenset(without))
    ]

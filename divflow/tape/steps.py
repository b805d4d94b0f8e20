"""What a tape holds: values made from its roots, each with the values that it is made from, and how.

A reader carries something through these steps from the roots to the output: the Jacobian as a sum of products
(`divflow.divergence.exact.layered`), or derivatives along directions to second order (`divflow.operators.forward_laplacian`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from divflow.tape.operation import Operation

__all__ = [
    "Copied",
    "Factor",
    "Kind",
    "Mapped",
    "Moved",
    "Opaque",
    "Product",
    "Reduced",
    "Root",
    "Scaled",
    "Standardized",
    "Step",
]

Factor = Tensor | float | None
"""A derivative at every entry of a value: None stands for one."""


class Root(NamedTuple):
    """What a tape starts from."""


class Copied(NamedTuple):
    """The same entries, maybe in another precision."""

    dtype: torch.dtype
    device: torch.device


class Moved(NamedTuple):
    """Entries of the sources, and constants; the sources are at some places among the operation's tensors.

    Attributes:
        operation: that moves them.
        places: of the sources.
        number: which of its results the value is.
    """

    operation: Operation
    places: tuple[int, ...]
    number: int


class Scaled(NamedTuple):
    """An elementwise function s(u_1, u_2, ...) of sources that are broadcast together.

    Attributes:
        shapes: of the u_i.
        slopes: s_i.
        curvatures: s_ij for i <= j that do not vanish; empty where a tape is not curved.
        shared: whether a slope is a constant, and may have fewer entries than the value.
    """

    shapes: list[torch.Size]
    slopes: list[Factor]
    curvatures: Mapping[tuple[int, int], Factor]
    shared: bool = False


class Mapped(NamedTuple):
    """A linear function of one source with constant coefficients.

    Attributes:
        operation: without what is added.
        place: of the source among the operation's tensors.
        matrix: `(n, m)` where it maps the last dimension; None for any other.
    """

    operation: Operation
    place: int
    matrix: Tensor | None = None


class Product(NamedTuple):
    """A function that is linear in each of its sources, at their places among the operation's tensors."""

    operation: Operation
    places: tuple[int, ...]


class Reduced(NamedTuple):
    """A function y of the entries along some dimensions, each of which one entry of the value sees.

    Attributes:
        operation: whose name and source's shape a message may give.
        dims: counted from the front; all of them, if it is of all.
        shape: of the source.
        slope: dy/du at every entry of the source.
        curvature: of first derivatives `(m, *source)` along m directions the sum over these of sum_ij y_ij u'_i u'_j,
            `(1, *value)`; None where it vanishes.
    """

    operation: Operation
    dims: tuple[int, ...]
    shape: torch.Size
    slope: Factor
    curvature: Callable[[Tensor], Tensor] | None = None


class Standardized(NamedTuple):
    """z = (u - mean u) / sigma, with sigma^2 = mean (u - mean u)^2 + eps along some dimensions; or without the mean.

    Attributes:
        dims: counted from the front.
        shape: of the source.
        value: z.
        scale: 1 / sigma, with the dimensions kept.
        centred: whether the mean is subtracted.
    """

    dims: tuple[int, ...]
    shape: torch.Size
    value: Tensor
    scale: Tensor
    centred: bool


class Opaque(NamedTuple):
    """A function that is known by its graph alone.

    Attributes:
        name: of the function.
        why: that is all that is known, such as "sort has no rule".
        value: with its graph.
        points: that the graph starts from, in the order of the sources.
        price: multiplications of one product with its Jacobian, for one sample; or what takes as long.
    """

    name: str
    why: str
    value: Tensor
    points: tuple[Tensor, ...]
    price: float


Kind = Root | Copied | Moved | Scaled | Mapped | Product | Reduced | Standardized | Opaque


class Step(NamedTuple):
    """A value: how it is made, the numbers of the steps of its sources, and its shape."""

    kind: Kind
    sources: tuple[int, ...]
    shape: torch.Size

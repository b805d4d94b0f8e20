"""The kinds of steps on a tape. Each step makes one value from earlier ones, its sources.

A reader carries something through the steps, from the roots to the output. `divflow.divergence.exact.layered` carries the
Jacobian as a sum of terms, `divflow.operators.forward_laplacian` derivatives along directions to second order.
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
"""A derivative at each entry of a value; None stands for the number 1."""


class Root(NamedTuple):
    """An input of the recorded function, which has no sources."""


class Copied(NamedTuple):
    """The same entries, maybe in another precision."""

    dtype: torch.dtype
    device: torch.device


class Moved(NamedTuple):
    """Entries of the sources, in other places, beside constants: views, indexing, concatenation.

    Attributes:
        operation: the operation that moves them.
        places: positions of the sources among the operation's tensors.
        number: which of the operation's results the value is.
    """

    operation: Operation
    places: tuple[int, ...]
    number: int


class Scaled(NamedTuple):
    """An elementwise function s(u_1, u_2, ...) of sources that are broadcast together.

    Attributes:
        shapes: shapes of the u_i.
        slopes: ds/du_i for each i.
        curvatures: d^2 s / du_i du_j for i <= j, those that are not zero; empty if the reader needs no second derivatives.
        shared: whether the slope is a constant factor, which may have fewer entries than the value.
    """

    shapes: list[torch.Size]
    slopes: list[Factor]
    curvatures: Mapping[tuple[int, int], Factor]
    shared: bool = False


class Mapped(NamedTuple):
    """A linear function of one source with constant coefficients.

    Attributes:
        operation: the linear part, without a bias.
        place: position of the source among the operation's tensors.
        matrix: `(n, m)` if it maps the last dimension; None for other maps, such as convolutions.
    """

    operation: Operation
    place: int
    matrix: Tensor | None = None


class Product(NamedTuple):
    """A function that is linear in each of its sources. `places` are their positions among the operation's tensors."""

    operation: Operation
    places: tuple[int, ...]


class Reduced(NamedTuple):
    """A function y(u_1, u_2, ...) of the entries along some dimensions, such as a sum or a norm.

    Attributes:
        operation: the operation, for messages.
        dims: the reduced dimensions, counted from the front.
        shape: shape of the source.
        slope: dy/du_i at each entry of the source.
        curvature: takes first derivatives u' of the source along m directions, `(m, *source)`, and returns
            sum_ij y_ij u'_i u'_j, added up over the directions, `(1, *value)`. None if it is zero.
    """

    operation: Operation
    dims: tuple[int, ...]
    shape: torch.Size
    slope: Factor
    curvature: Callable[[Tensor], Tensor] | None = None


class Standardized(NamedTuple):
    """z = (u - mean u) / sigma, with sigma^2 = mean (u - mean u)^2 + eps along some dimensions; or without the mean.

    Attributes:
        dims: the dimensions of the mean, counted from the front.
        shape: shape of the source.
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
    """A function without a rule, of which only the graph is known.

    Attributes:
        name: name of the function.
        why: reason, such as "sort has no rule".
        value: its value, with the graph.
        points: where the graph starts, in the order of the sources.
        price: cost of one product with its Jacobian for one sample, in multiplications.
    """

    name: str
    why: str
    value: Tensor
    points: tuple[Tensor, ...]
    price: float


Kind = Root | Copied | Moved | Scaled | Mapped | Product | Reduced | Standardized | Opaque


class Step(NamedTuple):
    """One value on a tape: how it is made, the numbers of the steps that made its sources, and its shape."""

    kind: Kind
    sources: tuple[int, ...]
    shape: torch.Size

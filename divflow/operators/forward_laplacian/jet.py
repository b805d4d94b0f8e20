"""Derivatives of a value along some directions of x, to second order: what the forward Laplacian carries.

A value y(x), and m directions v_1, ..., v_m of x, have the jet

    first[i] = d y(x + s v_i) / ds,     second = sum over i of d^2 y(x + s v_i) / ds^2      (at s = 0)

With the basis vectors as directions `first` is the gradient and `second` the Laplacian. The sum is what makes it cheap:
one second derivative is carried, not one a direction (the collapsed Taylor mode of Dangel et al. 2025).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from divflow.tape.steps import Factor

__all__ = ["Jet", "chained", "inner", "linear", "multilinear", "summed"]


class Jet(NamedTuple):
    """Derivatives of a value along m directions.

    Attributes:
        first: `(m, *value)`, or of size 1 where all entries of a dimension of the value share them.
        second: `(1, *value)` likewise; None if it vanishes.
    """

    first: Tensor
    second: Tensor | None = None

    def expand(self, shape: torch.Size) -> "Jet":
        """The same with every entry of a value of that shape."""
        return self.map(lambda rows: rows.expand(rows.shape[0], *shape))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Jet":
        """A linear function that acts on each row, applied."""
        return Jet(function(self.first), None if self.second is None else function(self.second))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum over directions of products of first derivatives, `(1, *value)`."""
    return (a * b).sum(dim=0, keepdim=True)


def chained(
    jets: Sequence[Jet], slopes: Sequence[Factor], curvatures: Mapping[tuple[int, int], Factor], ndim: int
) -> Jet:
    """The jet of s(u_1, u_2, ...) at every entry of a value.

        first = sum_i s_i u_i',     second = sum_i s_i u_i'' + sum_ij s_ij <u_i', u_j'>

    Args:
        jets: of the u_i.
        slopes: the s_i.
        curvatures: the s_ij for i <= j that do not vanish.
        ndim: of the value, as which the u_i are broadcast.
    """
    jets = [jet.map(lambda rows: _aligned(rows, ndim)) for jet in jets]
    parts = [jet.map(lambda rows, slope=slope: _times(rows, slope)) for jet, slope in zip(jets, slopes, strict=True)]  # type: ignore[misc]
    seconds = [part.second for part in parts if part.second is not None]
    for (i, j), curvature in curvatures.items():
        product = inner(jets[i].first, jets[j].first)
        seconds.append(_times(product if i == j else 2 * product, curvature))
    return Jet(summed([part.first for part in parts]), summed(seconds) if seconds else None)


def linear(rows: Callable[..., Tensor], jets: Sequence[Jet]) -> Jet:
    """The jet of a function that is linear in all of its arguments together, such as their concatenation.

    Args:
        rows: the function, of as many rows at once as there are; `torch.func.vmap` makes it of that of one.
        jets: of the arguments.
    """
    first = rows(*(jet.first for jet in jets))
    if all(jet.second is None for jet in jets):
        return Jet(first)
    zeros = (torch.zeros_like(jet.first[:1]) if jet.second is None else jet.second for jet in jets)
    return Jet(first, rows(*zeros))


def multilinear(function: Callable[[Mapping[int, Tensor]], Tensor], jets: Mapping[int, Jet]) -> Jet:
    """The jet of a function that is linear in each of its arguments, such as a product of matrices.

    Args:
        function: of tensors that stand in for some of its arguments, by their places.
        jets: of the arguments that depend on x, by their places.
    """
    firsts, seconds = [], []
    places = list(jets)
    for n, i in enumerate(places):
        rows = vmap(lambda row, i=i: function({i: row}))
        firsts.append(rows(jets[i].first))
        if jets[i].second is not None:
            seconds.append(rows(jets[i].second))
        for j in places[n + 1 :]:
            pairs = vmap(lambda a, b, i=i, j=j: function({i: a, j: b}))(jets[i].first, jets[j].first)
            seconds.append(2 * pairs.sum(dim=0, keepdim=True))
    return Jet(summed(firsts), summed(seconds) if seconds else None)


def _aligned(rows: Tensor, ndim: int) -> Tensor:
    """Rows of a value that is broadcast to more dimensions."""
    missing = ndim + 1 - rows.ndim
    return rows.reshape(rows.shape[0], *[1] * missing, *rows.shape[1:]) if missing else rows


def _times(rows: Tensor, factor: Factor) -> Tensor:
    return rows if factor is None else rows * factor


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

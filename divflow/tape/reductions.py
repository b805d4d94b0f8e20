"""Rules for reductions, which make one entry of many: sums, means, variances, norms, determinants.

Each entry u_i of the argument belongs to one entry y of the result. Along directions u' the derivatives are

    first: y' = sum_i s_i u'_i, with the slope s_i = dy/du_i        second: sum_ij y_ij u'_i u'_j, a quadratic form
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from divflow.tape.opaque import opaque
from divflow.tape.operation import Operation, tensors_in
from divflow.tape.rule import NoRule, Recorder, Rule
from divflow.tape.steps import Factor, Reduced

__all__ = ["Determinant", "Reduction"]

Quadratic = Callable[[Tensor], Tensor]


class _Call(NamedTuple):
    """A reduction as it was called.

    Attributes:
        x: the tensor that is reduced.
        dims: the reduced dimensions, counted from the front.
        keepdim: whether they are kept with size 1.
        options: all other arguments, by name.
    """

    x: Tensor
    dims: tuple[int, ...]
    keepdim: bool
    options: dict[str, Any]

    def whole(self, value: Tensor) -> Tensor:
        """A value with the reduced dimensions put back, with size 1."""
        for dim in () if self.keepdim else sorted(self.dims):
            value = value.unsqueeze(dim)
        return value

    def sum(self, rows: Tensor) -> Tensor:
        """Sum rows `(m, *x)` along the reduced dimensions."""
        return rows.sum([dim + 1 for dim in self.dims], keepdim=self.keepdim) if self.dims else rows

    def over(self, rows: Tensor) -> Tensor:
        """Sum rows `(m, *x)` along the reduced dimensions and over the m rows, `(1, *value)`."""
        return self.sum(rows.sum(dim=0, keepdim=True))

    @property
    def entries(self) -> int:
        """The number of entries that one entry of the value is made of."""
        return math.prod(self.x.shape[dim] for dim in self.dims)


Formula = Callable[[_Call, Tensor], tuple[Factor, Quadratic | None]]


@dataclass(frozen=True, eq=False)
class Reduction(Rule):
    """A function of the entries along some dimensions.

    Args:
        names: names of its arguments in order, "dim" and "keepdim" among them.
        formula: takes the call and the value; returns the slope and the quadratic form of the second derivative (None if it
            vanishes), or None for a call that it does not cover. Without a formula autograd computes both.
        flat: whether the second derivative is zero wherever it exists.
        kinked: whether some points have no derivative. First derivatives are then autograd's, for its conventions there.
    """

    names: tuple[str, ...] = ("input", "dim", "keepdim")
    formula: Callable[[_Call, Tensor], tuple[Factor, Quadratic | None] | None] | None = None
    flat: bool = False
    kinked: bool = False

    def record(self, tape: Recorder, op: Operation) -> Tensor:
        """Evaluate the reduction and its derivatives."""
        call = self._call(tape, op)
        formula = None if self.kinked and not tape.curved else self.formula
        value = None if formula is None else op()
        found = None if formula is None or value is None else formula(call, value)
        if found is not None:
            slope, quadratic = found
        elif tape.curved and not self.flat:
            return opaque(tape, op)
        else:
            value, slope, quadratic = *_by_autograd(tape, op, call.x), None
        assert value is not None
        return tape.learn(value, Reduced(op, call.dims, call.x.shape, slope, quadratic), [call.x])

    def _call(self, tape: Recorder, op: Operation) -> _Call:
        x = op.tensors[0]
        given = dict(zip(self.names, op.args, strict=False)) | op.kwargs
        if "out" in given or len(op.tensors) != 1 or len(op.args) > len(self.names):
            raise NoRule(f"{op.name} of several values of x")
        given = {name: value for name, value in given.items() if value is not x}
        dim, keepdim = given.pop("dim", given.pop("axis", None)), given.pop("keepdim", False)
        dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
        if isinstance(dim, bool) or any(type(item) is not int for item in dims if item is not None):
            raise NoRule(f"{op.name} called in another way")
        dims = tuple(range(x.ndim)) if dim is None or not dims else tuple(item % max(x.ndim, 1) for item in dims)
        return _Call(x, dims, keepdim, given)


class Determinant(Rule):
    """log |det A|. Its first derivative along A' is tr(A^-1 A'), its second -tr(A^-1 A' A^-1 A')."""

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate it."""
        result, (matrix,) = op(), op.tensors
        dims = matrix.ndim - 2, matrix.ndim - 1
        inverse = torch.linalg.inv(matrix)

        def quadratic(rows: Tensor) -> Tensor:
            turned = inverse @ rows
            return -(turned * turned.mT).sum(dim=0, keepdim=True).sum(dim=(-2, -1))

        *sign, logarithm = tensors_in(result)
        for value in sign:  # it does not change with A, but torch gives it a graph
            tape.learn(value, Reduced(op, dims, matrix.shape, 0.0), [matrix])
        tape.learn(logarithm, Reduced(op, dims, matrix.shape, inverse.mT, quadratic), [matrix])
        return result


def _by_autograd(tape: Recorder, op: Operation, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = x.view_as(x) if tape.differentiable else x.detach()
        point = point if point.requires_grad else point.requires_grad_()
        value = op.at(lambda tensor: point if tensor is x else tensor)
        (slope,) = torch.autograd.grad(value, point, torch.ones_like(value), create_graph=tape.differentiable)
    return value if tape.differentiable else value.detach(), slope


# Formulas.


def total(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """A sum."""
    return None if call.options else (None, None)


def average(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """A mean."""
    return None if call.options or not call.entries else (1 / call.entries, None)


def _less(call: _Call) -> float | None:
    """The c of a variance's divisor n - c, from `unbiased` or `correction`; None for options that are not covered."""
    options = dict(call.options)
    unbiased, correction = options.pop("unbiased", True), options.pop("correction", None)
    return None if options or not isinstance(unbiased, bool) else int(unbiased) if correction is None else correction


def _spread(call: _Call, rows: Tensor) -> Tensor:
    """sum_i (u'_i - mean u')^2, added up over the rows u'."""
    return call.over(rows * rows) - (call.sum(rows) ** 2).sum(dim=0, keepdim=True) / call.entries


def variance(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """A variance."""
    less = _less(call)
    if less is None or call.entries - less <= 0:
        return None
    scale = 2 / (call.entries - less)
    centred = call.x - call.x.mean(call.dims, keepdim=True)
    return scale * centred, lambda rows: scale * _spread(call, rows)


def deviation(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """A standard deviation. Where it is zero its derivatives are zero, as autograd has them."""
    less = _less(call)
    if less is None or call.entries - less <= 0:
        return None
    zero = y == 0
    length = torch.where(zero, 1.0, y)
    slope = (call.x - call.x.mean(call.dims, keepdim=True)) / (call.whole(length) * (call.entries - less))
    slope = torch.where(call.whole(zero), 0.0, slope)

    def quadratic(rows: Tensor) -> Tensor:
        along = (call.sum(slope * rows) ** 2).sum(dim=0, keepdim=True)
        return torch.where(zero, 0.0, (_spread(call, rows) / (call.entries - less) - along) / length)

    return slope, quadratic


def norm(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """The Euclidean norm, and the sum of absolute values. At zero their derivatives are zero, as autograd has them."""
    order = next((call.options.get(name) for name in ("p", "ord") if name in call.options), None)
    others = any(value is not None for name, value in call.options.items() if name not in ("p", "ord"))
    if others or order not in (1, 2, None, "fro"):
        return None
    if order == 1:
        return call.x.sign(), None
    zero = y == 0
    length = torch.where(zero, 1.0, y)
    slope = torch.where(call.whole(zero), 0.0, call.x / call.whole(length))

    def quadratic(rows: Tensor) -> Tensor:
        along = (call.sum(slope * rows) ** 2).sum(dim=0, keepdim=True)
        return torch.where(zero, 0.0, (call.over(rows * rows) - along) / length)

    return slope, quadratic


def matrix_norm(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """`torch.linalg.norm` of vectors, and of matrices if it is the Euclidean (Frobenius) norm."""
    order = call.options.get("ord")
    return None if order is not None and len(call.dims) > 1 and call.x.ndim > 1 and order != "fro" else norm(call, y)


def log_sum_exp(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """The log sum exp, whose slope is the softmax."""
    if call.options:
        return None
    weights = (call.x - torch.where(call.whole(y).isfinite(), call.whole(y), 0.0)).exp()

    def quadratic(rows: Tensor) -> Tensor:
        along = (call.sum(weights * rows) ** 2).sum(dim=0, keepdim=True)
        return call.over(weights * rows * rows) - along

    return weights, quadratic


def product(call: _Call, y: Tensor) -> tuple[Factor, Quadratic | None] | None:
    """A product along one dimension. Its derivatives are built factor by factor, without division, so that zeros are allowed."""
    if call.options or len(call.dims) != 1:
        return None
    (dim,) = call.dims
    entries = call.x.unbind(dim)
    before, after = [torch.ones_like(y) if not call.keepdim else torch.ones_like(y.squeeze(dim))], []
    for entry in entries[:-1]:
        before.append(before[-1] * entry)
    rest = torch.ones_like(before[0])
    for entry in reversed(entries):
        after.append(rest)
        rest = rest * entry
    slope = torch.stack([a * b for a, b in zip(before, reversed(after), strict=True)], dim)

    def quadratic(rows: Tensor) -> Tensor:
        value: Tensor = before[0]
        first: Tensor | float = 0.0
        second: Tensor | float = 0.0
        for entry, along in zip(entries, rows.unbind(dim + 1), strict=True):
            value, first, second = value * entry, first * entry + value * along, second * entry + 2 * first * along
        total = second.sum(dim=0, keepdim=True) if isinstance(second, Tensor) else rows.new_zeros(())
        return total.unsqueeze(dim + 1) if call.keepdim else total

    return slope, quadratic

"""Rules for elementwise functions: closed formulas of both derivatives for common ones, and autograd for all others."""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from divflow.tape.operation import Operation
from divflow.tape.rule import NoRule, Recorder, Rule
from divflow.tape.steps import Factor, Scaled

__all__ = ["FORMULAS", "PARTIALS", "BatchNorm", "Elementwise", "Formula", "Partials"]

Curvatures = dict[tuple[int, int], Factor]


@dataclass(frozen=True, eq=False)
class Elementwise(Rule):
    """The rule of a function that acts on each entry of its operands, which are broadcast together.

    Args:
        slope: the derivative at every entry of the value, as a function of the operation's operands and options as it was
            called. For several tensors it returns a tuple of one derivative each, in their order. None takes autograd's.
        curvature: likewise the second derivative. For several tensors it returns a dict of those that do not vanish by
            pairs `(i, j)`, i <= j. None takes the slope's own derivative by autograd.

    Example:
        >>> rule = Elementwise(slope=lambda u: 1 - u.tanh() ** 2)
    """

    slope: Callable[..., Any] | None = None
    curvature: Callable[..., Any] | None = None

    def identity(self, op: Operation) -> Hashable:
        """The rule and the formula that it uses: another formula makes another plan."""
        return id(self), id(FORMULAS.get(op.name)), id(PARTIALS.get(op.name))

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate the function and its derivatives."""
        if op.kwargs.get("inplace") or (op.name.endswith("_") and not op.name.startswith("_")):
            return self._in_place(tape, op)
        if "out" in op.kwargs:
            raise NoRule(f"{op.name} with out")
        if "inplace" in op.kwargs:
            op = op._replace(kwargs={key: value for key, value in op.kwargs.items() if key != "inplace"})
        value, operands, slopes, curvatures = self._derivatives(tape, op)
        # With one operand and a constant, as in 3 * u, the slope is the constant, which may have fewer entries than the value.
        shared = len(operands) == 1 and op.name in PARTIALS and self.slope is None
        shapes = [operand.shape for operand in operands]
        return tape.learn(value, Scaled(shapes, slopes, curvatures, shared), operands)

    def _derivatives(self, tape: Recorder, op: Operation) -> tuple[Tensor, list[Tensor], list[Factor], Curvatures]:
        operands = [tensor for tensor in op.tensors if tape.depends(tensor)]
        if self.slope is not None:
            return self._given(tape, op)
        formula = FORMULAS.get(op.name)
        if formula is not None and _is_plain(op) and not (tape.curved and formula.curvature is _UNKNOWN):
            value = op()
            slope = formula.slope(operands[0], value)
            if not tape.curved or formula.curvature is None:
                return value, operands, [slope], {}
            return value, operands, [slope], {(0, 0): formula.curvature(operands[0], value, slope)}
        partials = PARTIALS.get(op.name)
        if partials is not None and not op.kwargs and len(op.args) == 2:
            value = op()
            try:
                slopes = partials.slopes(*op.args, value)
                curvatures = partials.curvatures(*op.args, value) if tape.curved else {}
            except ArithmeticError as error:  # Python's numbers raise where a tensor would become infinite
                raise NoRule(f"{op.name}: {error}") from error
            places = [i for i, argument in enumerate(op.args) if tape.depends(argument)]
            return value, operands, [slopes[i] for i in places], _at(places, curvatures)
        return self._by_autograd(tape, op)

    def _given(self, tape: Recorder, op: Operation) -> tuple[Tensor, list[Tensor], list[Factor], Curvatures]:
        """By the slope and curvature of the rule; without a curvature, by autograd from the slope."""
        assert self.slope is not None
        places = [i for i, tensor in enumerate(op.tensors) if tape.depends(tensor)]
        if not tape.curved or self.curvature is not None:
            slopes = _as_tuple(self.slope(*op.args, **op.kwargs))
            curvatures = self.curvature(*op.args, **op.kwargs) if tape.curved and self.curvature is not None else {}
            found = curvatures if isinstance(curvatures, Mapping) else {(0, 0): curvatures}
            return op(), [op.tensors[i] for i in places], [slopes[i] for i in places], _at(places, found)
        operands = [*{id(op.tensors[i]): op.tensors[i] for i in places}.values()]
        with torch.enable_grad():
            points, at = _points(tape, op, operands)
            args, kwargs = at(op)
            derived = [_as_tuple(self.slope(*args, **kwargs))[i] for i in places]
            bends = _curvatures(tape, derived, points)
        if len(operands) < len(places):
            raise NoRule(f"{op.name} of one tensor twice, without its curvature")
        value = op()
        return value, operands, [_detached(tape, slope) for slope in derived], bends

    def _by_autograd(self, tape: Recorder, op: Operation) -> tuple[Tensor, list[Tensor], list[Factor], Curvatures]:
        """By reverse mode; at kinks, derivatives follow autograd's conventions."""
        operands = [*{id(tensor): tensor for tensor in op.tensors if tape.depends(tensor)}.values()]
        with torch.enable_grad():
            points, at = _points(tape, op, operands)
            args, kwargs = at(op)
            value = op.func(*args, **kwargs)
            slopes = _entries(value, points, tape.curved or tape.differentiable)
            curvatures = _curvatures(tape, slopes, points) if tape.curved else {}
        factors = [0.0 if slope is None else _detached(tape, slope) for slope in slopes]
        return _detached(tape, value), operands, factors, curvatures

    def _in_place(self, tape: Recorder, op: Operation) -> Tensor:
        """Record an operation in place as one out of place: at a copy of its argument, over which its value is then written."""
        target, base = op.tensors[0], op.name.rstrip("_")
        if not tape.depends(target):
            raise NoRule(f"{op.name} on a constant")
        before = tape.alias(target.clone(), target)
        plain = op.func if base == op.name else getattr(torch.Tensor, base, None) or getattr(F, base)
        value = self.record(tape, op.out_of_place(lambda tensor: before if tensor is target else tensor, plain, base))
        if value.shape != target.shape or value.dtype != target.dtype:
            raise NoRule(f"{op.name} that changes shape or dtype")
        target.copy_(value)
        return tape.alias(target, value)


class BatchNorm(Elementwise):
    """Batch normalization in evaluation mode, which is elementwise because its statistics are constants."""

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate it; training mode, which mixes samples, has no rule."""
        if op.args[5] if len(op.args) > 5 else op.kwargs.get("training", False):
            raise NoRule("batch_norm over the batch")
        return super().record(tape, op)


def _is_plain(op: Operation) -> bool:
    """Whether the function is called with one tensor, its first argument, and the options that its formula assumes."""
    if len(op.args) == 1 and not op.kwargs:
        return op.name not in _OPTIONS or "exponent" not in _OPTIONS[op.name]
    options = _OPTIONS.get(op.name, {})
    if len(op.tensors) != 1 or not op.args or op.args[0] is not op.tensors[0] or len(op.args) - 1 > len(options):
        return False
    # By name, because a call may have them in any order.
    given = dict(zip(options, op.args[1:], strict=False)) | op.kwargs
    return options | given == options


_OPTIONS: dict[str, dict[str, Any]] = {
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "gelu": {"approximate": "none"},
    "pow": {"exponent": 2},
}


def _as_tuple(slopes: Any) -> tuple[Any, ...]:
    return slopes if isinstance(slopes, tuple) else (slopes,)


def _at(places: list[int], curvatures: Mapping[tuple[int, int], Factor]) -> Curvatures:
    """Curvatures between the operands at `places`, numbered within these."""
    return {
        (places.index(i), places.index(j)): curvature
        for (i, j), curvature in curvatures.items()
        if i in places and j in places
    }


def _detached(tape: Recorder, tensor: Any) -> Any:
    return tensor if tape.differentiable or not isinstance(tensor, Tensor) else tensor.detach()


def _points(tape: Recorder, op: Operation, operands: list[Tensor]) -> tuple[list[Tensor], Callable[[Operation], Any]]:
    """Copies of the operands to differentiate in, and a function that puts them into an operation's arguments."""
    shape = operands[0].shape
    with contextlib.suppress(RuntimeError):
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in op.tensors))
    points: dict[int, Tensor] = {}
    for operand in operands:
        # Expanded to the value's shape, because autograd would add up the derivatives of entries that are broadcast.
        point = (operand if tape.differentiable else operand.detach()).expand(shape)
        points[id(operand)] = point if point.requires_grad else point.requires_grad_()
    return [*points.values()], lambda op: op.arguments(lambda tensor: points.get(id(tensor), tensor))


def _entries(value: Any, points: list[Tensor], create_graph: bool) -> list[Tensor | None]:
    """dy_i/du_i at each entry i of a value y, for each point u; None for a point that y does not depend on."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None] * len(points)
    found = torch.autograd.grad(
        value, points, torch.ones_like(value), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    if any(derivative is not None and derivative.shape != value.shape for derivative in found):
        raise NoRule("broadcasting in a way of its own")
    return list(found)


def _curvatures(tape: Recorder, slopes: list[Any], points: list[Tensor]) -> Curvatures:
    curvatures: Curvatures = {}
    for i, slope in enumerate(slopes):
        for j, curvature in enumerate(_entries(slope, points, tape.differentiable)):
            if i <= j and curvature is not None:
                curvatures[i, j] = curvature
    return curvatures


# Formulas. Reverse mode gives the same values, but its overhead exceeds the evaluation of a small layer.


class Formula(NamedTuple):
    """Derivatives of y = s(u): the slope s'(u) from u and y, the curvature s''(u) from u, y and s'(u); None if it vanishes."""

    slope: Callable[[Tensor, Tensor], Factor]
    curvature: Callable[[Tensor, Tensor, Any], Factor] | None = None


class Partials(NamedTuple):
    """Derivatives of y = s(a, b) from a, b and y: both slopes, and the curvatures by pairs of arguments, (0, 1) for a and b."""

    slopes: Callable[[Any, Any, Tensor], tuple[Factor, Factor]]
    curvatures: Callable[[Any, Any, Tensor], Curvatures] = lambda a, b, y: {}


def _UNKNOWN(u: Tensor, y: Tensor, s: Any) -> Factor:  # noqa: N802 - a mark
    """Marks a curvature that is left to autograd."""
    raise AssertionError


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=dtype, device=device)


def _silu_slope(u: Tensor, y: Tensor) -> Tensor:
    gate = u.sigmoid()
    return torch.addcmul(gate, y, 1 - gate)


def _silu_curvature(u: Tensor, y: Tensor, s: Tensor) -> Tensor:
    gate = u.sigmoid()
    return gate * (1 - gate) * (2 + u * (1 - 2 * gate))


def _mish_slope(u: Tensor, y: Tensor) -> Tensor:
    gate = F.softplus(u).tanh()
    return torch.addcmul(gate, u * u.sigmoid(), 1 - gate.square())


def _softplus_slope(u: Tensor, y: Tensor) -> Tensor:
    return torch.where(u > 20, 1.0, u.sigmoid())  # linear above 20, as torch has it


def _gelu_density(u: Tensor) -> Tensor:
    return (-0.5 * u * u).exp() / math.sqrt(2 * math.pi)


def _gelu_slope(u: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * _gelu_density(u)


FORMULAS: dict[str, Formula] = {
    "tanh": Formula(lambda u, y: torch.addcmul(_one(y.dtype, y.device), y, y, value=-1), lambda u, y, s: -2 * y * s),
    "sigmoid": Formula(lambda u, y: y * (1 - y), lambda u, y, s: s * (1 - 2 * y)),
    # Torch rounds the derivatives of these differently with a graph, so a verified call would differ from others.
    "silu": Formula(_silu_slope, _silu_curvature),
    "mish": Formula(_mish_slope, _UNKNOWN),
    "softplus": Formula(_softplus_slope, lambda u, y, s: s * (1 - s)),
    "gelu": Formula(_gelu_slope, lambda u, y, s: _gelu_density(u) * (2 - u * u)),
    "relu": Formula(lambda u, y: (u > 0).to(y.dtype)),
    "exp": Formula(lambda u, y: y, lambda u, y, s: y),
    "log": Formula(lambda u, y: 1 / u, lambda u, y, s: -1 / (u * u)),
    "sin": Formula(lambda u, y: u.cos(), lambda u, y, s: -y),
    "cos": Formula(lambda u, y: -u.sin(), lambda u, y, s: -y),
    "square": Formula(lambda u, y: 2 * u, lambda u, y, s: 2.0),
    "pow": Formula(lambda u, y: 2 * u, lambda u, y, s: 2.0),
    "sqrt": Formula(lambda u, y: 0.5 / y, lambda u, y, s: -0.25 / (u * y)),
    "rsqrt": Formula(lambda u, y: -0.5 * y * y * y, lambda u, y, s: 0.75 * y * y * (y * y * y)),
    "reciprocal": Formula(lambda u, y: -y * y, lambda u, y, s: 2 * y * y * y),
    "neg": Formula(lambda u, y: -1.0),
}
"""Functions of one tensor, by the name of the operation."""

PARTIALS: dict[str, Partials] = {
    "add": Partials(lambda a, b, y: (None, None)),
    "sub": Partials(lambda a, b, y: (None, -1.0)),
    "rsub": Partials(lambda a, b, y: (-1.0, None)),
    "mul": Partials(lambda a, b, y: (b, a), lambda a, b, y: {(0, 1): None}),
    "div": Partials(lambda a, b, y: (1 / b, -y / b), lambda a, b, y: {(0, 1): -1 / (b * b), (1, 1): 2 * y / (b * b)}),
}
"""Functions of two arguments, by the name of the operation."""

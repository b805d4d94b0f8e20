"""Elementwise functions: their first and second derivatives, written out for the most common, by autograd for all."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from divflow.divergence.layered import NoRule
from divflow.divergence.layered.operation import Operation
from divflow.laplacian.jet import Factor, chained
from divflow.laplacian.tape import Tape

__all__ = ["elementwise"]

Derivatives = tuple[list[Factor], dict[tuple[int, int], Factor]]


def elementwise(tape: Tape, op: Operation) -> Tensor:
    """Any elementwise function of any number of arguments that are broadcast together."""
    if op.kwargs.get("inplace") or op.name.endswith("_"):
        return _in_place(tape, op)
    if "out" in op.kwargs:
        raise NoRule(f"{op.name} with out")
    if "inplace" in op.kwargs:
        op = op._replace(kwargs={key: value for key, value in op.kwargs.items() if key != "inplace"})
    operands = [tensor for tensor in op.tensors if tape.depends(tensor)]
    if _is_plain(op) and op.name in _OF_ONE:
        value = op()
        slope, curvature = _OF_ONE[op.name](operands[0], value)
        slopes: list[Factor] = [slope]
        curvatures: dict[tuple[int, int], Factor] = {} if curvature is None else {(0, 0): curvature}
    elif not op.kwargs and len(op.args) == 2 and op.name in _OF_TWO:
        value = op()
        try:
            slopes, curvatures = _OF_TWO[op.name](*op.args, value)
        except ArithmeticError as error:  # of Python's numbers, which can't be infinite as a tensor's can
            raise NoRule(f"{op.name}: {error}") from error
        places = [i for i, argument in enumerate(op.args) if tape.depends(argument)]
        slopes = [slopes[i] for i in places]
        curvatures = {
            (places.index(i), places.index(j)): curvature
            for (i, j), curvature in curvatures.items()
            if i in places and j in places
        }
    else:
        operands = [*{id(operand): operand for operand in operands}.values()]
        value, (slopes, curvatures) = _by_autograd(tape, op, operands)
    return tape.learn(value, operands, lambda *jets: chained(jets, slopes, curvatures, value.ndim))


def _is_plain(op: Operation) -> bool:
    """Whether it is the function of one tensor, its first argument, with the options that it is written out for."""
    options = _OPTIONS.get(op.name, {})
    if len(op.tensors) != 1 or not op.args or op.args[0] is not op.tensors[0] or len(op.args) - 1 > len(options):
        return False
    # By name: in a call they may stand in any order.
    given = dict(zip(options, op.args[1:], strict=False)) | op.kwargs
    return options | given == options


_OPTIONS: dict[str, dict[str, Any]] = {
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "gelu": {"approximate": "none"},
    "pow": {"exponent": 2},
}


def _tanh(u: Tensor, y: Tensor) -> tuple[Factor, Factor]:
    slope = 1 - y * y
    return slope, -2 * y * slope


def _sigmoid(u: Tensor, y: Tensor) -> tuple[Factor, Factor]:
    slope = y * (1 - y)
    return slope, slope * (1 - 2 * y)


def _silu(u: Tensor, y: Tensor) -> tuple[Factor, Factor]:
    gate = u.sigmoid()
    rest = 1 - gate
    return gate + y * rest, gate * rest * (2 + u * (1 - 2 * gate))


def _softplus(u: Tensor, y: Tensor) -> tuple[Factor, Factor]:
    # Linear above 20, as torch has it.
    gate = torch.where(u > 20, 1.0, u.sigmoid())
    return gate, gate * (1 - gate)


def _gelu(u: Tensor, y: Tensor) -> tuple[Factor, Factor]:
    density = (-0.5 * u * u).exp() / math.sqrt(2 * math.pi)
    return torch.special.ndtr(u) + u * density, density * (2 - u * u)


# Derivatives s'(u), s''(u) of y = s(u); None stands for one as the first, and for zero as the second.
_OF_ONE: dict[str, Callable[[Tensor, Tensor], tuple[Factor, Factor]]] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": _softplus,
    "gelu": _gelu,
    "relu": lambda u, y: ((u > 0).to(y.dtype), None),
    "exp": lambda u, y: (y, y),
    "log": lambda u, y: (1 / u, -1 / (u * u)),
    "sqrt": lambda u, y: (0.5 / y, -0.25 / (u * y)),
    "reciprocal": lambda u, y: (-y * y, 2 * y * y * y),
    "sin": lambda u, y: (u.cos(), -y),
    "cos": lambda u, y: (-u.sin(), -y),
    "square": lambda u, y: (2 * u, 2.0),
    "pow": lambda u, y: (2 * u, 2.0),
    "neg": lambda u, y: (-1.0, None),
}
# The same for y = s(a, b), by the places of the arguments.
_OF_TWO: dict[str, Callable[[Any, Any, Tensor], Derivatives]] = {
    "add": lambda a, b, y: ([None, None], {}),
    "sub": lambda a, b, y: ([None, -1.0], {}),
    "rsub": lambda a, b, y: ([-1.0, None], {}),
    "mul": lambda a, b, y: ([b, a], {(0, 1): None}),
    "div": lambda a, b, y: ([1 / b, -y / b], {(0, 1): -1 / (b * b), (1, 1): 2 * y / (b * b)}),
}


def _by_autograd(tape: Tape, op: Operation, operands: list[Tensor]) -> tuple[Tensor, Derivatives]:
    """The value and its derivatives in each operand, by reverse mode, whose conventions at kinks are autograd's."""
    shape = operands[0].shape
    with contextlib.suppress(RuntimeError):
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in op.tensors))
    points: dict[int, Tensor] = {}
    with torch.enable_grad():
        for operand in operands:
            # Broadcast beforehand, so that the derivatives at the entries of the value are not added up.
            point = (operand if tape.differentiable else operand.detach()).expand(shape)
            points[id(operand)] = point if point.requires_grad else point.requires_grad_()
        inputs = [*points.values()]
        value = op.at(lambda tensor: points.get(id(tensor), tensor))
        slopes = _entries(value, inputs, True)
        curvatures: dict[tuple[int, int], Factor] = {}
        for i, slope in enumerate(slopes):
            for j, curvature in enumerate(_entries(slope, inputs, tape.differentiable)):
                if i <= j and curvature is not None:
                    curvatures[i, j] = curvature
    if not tape.differentiable:
        value, slopes = value.detach(), [None if slope is None else slope.detach() for slope in slopes]
    return value, ([0.0 if slope is None else slope for slope in slopes], curvatures)


def _entries(value: Tensor | None, inputs: list[Tensor], create_graph: bool) -> list[Tensor | None]:
    """Derivatives of a value at every one of its entries; None if it does not depend on an input."""
    if value is None or not value.requires_grad:
        return [None] * len(inputs)
    found = torch.autograd.grad(
        value, inputs, torch.ones_like(value), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    if any(derivative is not None and derivative.shape != value.shape for derivative in found):
        raise NoRule("broadcasting in a way of its own")
    return list(found)


def _in_place(tape: Tape, op: Operation) -> Tensor:
    """The function out of place, at a copy of its argument that stays as it is, and its value over the argument."""
    target, base = op.tensors[0], op.name.rstrip("_")
    if not tape.depends(target):
        raise NoRule(f"{op.name} on a constant")
    before = tape.alias(target.clone(), target)
    plain = op.func if base == op.name else getattr(torch.Tensor, base, None) or getattr(F, base)
    value = elementwise(tape, op.out_of_place(lambda tensor: before if tensor is target else tensor, plain, base))
    if value.shape != target.shape or value.dtype != target.dtype:
        raise NoRule(f"{op.name} that changes shape or dtype")
    target.copy_(value)
    return tape.alias(target, value)

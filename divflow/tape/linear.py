"""Rules for what is linear: in one operand, or in each of several."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from divflow.tape.operation import Operation
from divflow.tape.rule import NoRule, Recorder, Rule
from divflow.tape.steps import Mapped, Product

__all__ = ["Layer", "Linear", "Matmul", "Multilinear"]


@dataclass(frozen=True, eq=False)
class Linear(Rule):
    """The rule of a function that is linear in one of its arguments, for each sample by itself.

    Args:
        place: of that argument among the tensors that the operation is called with, from 0.

    Example:
        >>> rule = Linear(0)
    """

    place: int = 0

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate it."""
        depends = [i for i, tensor in enumerate(op.tensors) if tape.depends(tensor)]
        if depends != [self.place]:
            raise NoRule(f"{op.name} is linear in its argument {self.place} alone")
        return tape.learn(_one(op), Mapped(op, self.place), [op.tensors[self.place]])


class Multilinear(Rule):
    """A function that is linear in each of its tensors."""

    def record(self, tape: Recorder, op: Operation) -> Tensor:
        """Evaluate it."""
        return _learn(tape, op, _one(op))


class Matmul(Rule):
    """A product of matrices or vectors, the last dimension of the first argument with one of the second."""

    def record(self, tape: Recorder, op: Operation) -> Tensor:
        """Evaluate it."""
        if not op.kwargs and len(op.args) == 2:
            x, other = op.args
            if tape.depends(x) and not tape.depends(other) and other.ndim == 2 and x.ndim >= 2:
                return tape.learn(op(), Mapped(op, 0, other.mT), [x])
        return _learn(tape, op, _one(op))


@dataclass(frozen=True, eq=False)
class Layer(Rule):
    """A function that is linear in input and weight, plus a bias.

    Args:
        names: of input, weight and bias in a call, in the order of the arguments.
        matrix: of the weight the matrix `(n, m)` that maps the last dimension of the input, if it is one.
    """

    names: tuple[str, str, str] = ("input", "weight", "bias")
    matrix: Callable[[Tensor], Tensor | None] | None = None

    def record(self, tape: Recorder, op: Operation) -> Tensor:
        """Evaluate it; a bias that depends on x is added to it afterwards."""
        x, weight, bias = self._parts(op)
        if tape.depends(bias):
            if self.matrix is None:
                raise NoRule(f"{op.name} with a bias that depends on x")
            plain = _without(op, bias, self.names[2])
            return tape.follow(lambda: plain() + bias)
        if self.matrix is not None and isinstance(weight, Tensor) and not tape.depends(weight):
            matrix = self.matrix(weight)
            if matrix is not None:
                return tape.learn(op(), Mapped(op, 0, matrix), [x])
        return _learn(tape, _without(op, bias, self.names[2]), op())

    def _parts(self, op: Operation) -> tuple[Any, Any, Any]:
        if not op.kwargs:
            return op.args[0], op.args[1], op.args[2] if len(op.args) > 2 else None
        parts = dict(zip(self.names, op.args, strict=False)) | op.kwargs
        return parts.get(self.names[0]), parts.get(self.names[1]), parts.get(self.names[2])


def _without(op: Operation, bias: Any, name: str) -> Operation:
    """The operation without its bias, the third argument."""
    if bias is None:
        return op
    kwargs = {key: item for key, item in op.kwargs.items() if key != name}
    args = (*op.args[:2], None, *op.args[3:])[: len(op.args)]
    return Operation(
        op.func, op.name, args, kwargs, [tensor for tensor in op.tensors if tensor is not bias], op.summary
    )


def _learn(tape: Recorder, op: Operation, value: Tensor) -> Tensor:
    """That a value is linear in each of an operation's tensors, but for what is added to it."""
    places = tuple(i for i, tensor in enumerate(op.tensors) if tape.depends(tensor))
    operands = [op.tensors[i] for i in places]
    return tape.learn(value, Mapped(op, places[0]) if len(places) == 1 else Product(op, places), operands)


def _one(op: Operation) -> Tensor:
    value = op()
    if not isinstance(value, Tensor):
        raise NoRule(f"{op.name} of several values")
    return value

"""Functions without a rule: known by their graph alone, through which readers take products of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from divflow.tape.cache import Cache
from divflow.tape.operation import Operation, tensors_in, version
from divflow.tape.randomness import rng_states
from divflow.tape.rule import NoRule, Recorder
from divflow.tape.steps import Opaque
from divflow.tape.work import Work

__all__ = ["EvaluatedError", "counted", "evaluated", "opaque", "price", "price_by_entries"]

# What takes as long, for each entry that comes in or goes out, as so many multiplications of a matrix product.
_ELEMENT = 16
# Multiplications of operations for the whole batch, by what they are called with.
_OPERATIONS: Cache[int] = Cache(1024)


def opaque(tape: Recorder, op: Operation, why: str = "") -> Any:
    """Evaluate an operation for its graph, and tell the tape.

    Args:
        tape: the tape.
        op: the operation.
        why: it has no rule, or its rule does not serve.

    Raises:
        NoRule: it has no backward, is random or changes an argument; `EvaluatedError`, with its value.
    """
    why = why or f"{op.name} has no rule"
    operands = [*{id(tensor): tensor for tensor in op.tensors if tape.depends(tensor)}.values()]
    states, versions = rng_states(operands[0]), [version(tensor) for tensor in op.tensors]
    result, points = evaluated(op, operands, tape.differentiable)
    values = [tensor for tensor in tensors_in(result) if tensor.is_floating_point() or tensor.is_complex()]
    if versions != [version(tensor) for tensor in op.tensors]:
        raise EvaluatedError(why, result, [*values, *op.tensors])
    if any(not torch.equal(before, after) for before, after in zip(states, rng_states(operands[0]), strict=True)):
        raise EvaluatedError(f"{why}, and is random", result, values)
    if not any(value.requires_grad for value in values):
        raise EvaluatedError(f"{why}, and no backward", result, values)
    try:
        for value in values:
            tape.learn(value, Opaque(op.name, why, value, points, price(op, value, operands)), operands)
    except NoRule as error:
        raise EvaluatedError(why if "batch" in why else f"{why}, and {error}", result, values) from error
    return result


def evaluated(op: Operation, operands: Sequence[Tensor], differentiable: bool) -> tuple[Any, tuple[Tensor, ...]]:
    """An operation's value, with its graph from points that stand in for some operands, and these points."""
    with torch.enable_grad():
        points = [operand.view_as(operand) if differentiable else operand.detach() for operand in operands]
        points = [point if point.requires_grad else point.requires_grad_() for point in points]
        new = {id(operand): point for operand, point in zip(operands, points, strict=True)}
        result, _ = counted(op, lambda: op.at(lambda tensor: new.get(id(tensor), tensor)))
    return result, tuple(points)


def counted(op: Operation, evaluate: Callable[[], Any]) -> tuple[Any, int]:
    """What an evaluation of an operation returns, and its multiplications, which are counted once."""
    operations = _OPERATIONS.get(op.summary)
    if operations is not None:
        return evaluate(), operations
    with Work() as work:
        result = evaluate()
    _OPERATIONS.keep(op.summary, work.operations)
    return result, work.operations


def price(op: Operation, value: Tensor, operands: Sequence[Tensor]) -> float:
    """Multiplications of one product with the Jacobian of an operation that was evaluated, for a sample."""
    return (_OPERATIONS.get(op.summary) or 0) / max(1, len(value) if value.ndim else 1) + price_by_entries(
        value, operands
    )


class EvaluatedError(NoRule):
    """An operation was evaluated, but of some tensors only that they depend on the roots is known.

    Attributes:
        result: of the operation.
        unknown: those tensors.
    """

    def __init__(self, reason: str, result: Any, unknown: list[Tensor]) -> None:
        super().__init__(reason)
        self.result, self.unknown = result, unknown


def price_by_entries(value: Tensor, operands: Sequence[Tensor]) -> float:
    """What a product through a function takes for a sample at least."""
    batch = max(1, value.shape[0] if value.ndim else 1)
    return _ELEMENT * (value.numel() + sum(operand.numel() for operand in operands)) / batch

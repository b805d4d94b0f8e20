"""Rules for what moves entries or copies them, and for what is constant whatever its arguments hold."""

from typing import Any

from torch import Tensor

from divflow.tape.operation import Operation, tensors_in
from divflow.tape.rule import Recorder, Rule
from divflow.tape.steps import Copied, Moved

__all__ = ["Constant", "Copy", "Movement"]


class Movement(Rule):
    """Results whose entries are entries of the arguments, or constants."""

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate it."""
        places = tuple(i for i, tensor in enumerate(op.tensors) if tape.depends(tensor))
        operands, result = [op.tensors[i] for i in places], op()
        for number, value in enumerate(tensors_in(result)):
            tape.learn(value, Moved(op, places, number), operands)
        return result


class Copy(Rule):
    """Copies and conversions of a value."""

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate it."""
        result, source = op(), op.tensors[0]
        if result is source or not isinstance(result, Tensor) or not tape.depends(source):
            return result
        if not (result.is_floating_point() or result.is_complex()):
            return result
        return tape.learn(result, Copied(result.dtype, result.device), [source])


class Constant(Rule):
    """What only shape, dtype and device, or the detached value, are taken for."""

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate it."""
        return op()

"""What an operation is, whatever is carried through it: a rule evaluates it, and records how its value is made."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor

from divflow.errors import FieldError
from divflow.tape.operation import Operation
from divflow.tape.steps import Kind

__all__ = ["NoRule", "Recorder", "Rule", "RuleError"]


class NoRule(Exception):  # noqa: N818 - caught inside this package, and no error
    """An operation without the steps that are needed; the message names it."""


class RuleError(FieldError):
    """A rule that was registered is wrong."""


class Recorder(Protocol):
    """What a rule writes to: a tape.

    Attributes:
        differentiable: whether values and slopes keep their graph.
        curved: whether second derivatives are needed.
    """

    differentiable: bool
    curved: bool

    def depends(self, tensor: object) -> bool:
        """Whether a tensor is known to depend on the roots."""

    def learn(self, value: Tensor, kind: Kind, operands: Sequence[Tensor]) -> Tensor:
        """Remember how a value is made from some operands, and return it."""

    def alias(self, value: Tensor, operand: Tensor) -> Tensor:
        """Remember that a value has the derivatives of another one, and return it."""

    def follow(self, function: Callable[[], Any]) -> Any:
        """Call a function, every operation of which is followed."""


class Rule(ABC):
    """How an operation is followed."""

    @property
    def compares_values(self) -> bool:
        """Whether its value is another function's, and must be compared with the operation's own."""
        return False

    def identity(self, op: Operation) -> Hashable:
        """What the operation's step depends on beside its arguments, so that another formula is verified anew."""
        return id(self)

    @abstractmethod
    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate the operation, tell the tape its step, and return its value.

        Raises:
            NoRule: its arguments are not covered.
        """

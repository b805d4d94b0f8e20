"""What a method of the exact divergence is: it prepares an evaluation that it serves, or refuses with a reason."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.followed import Followed
from divflow.operators.dense import products_per_pass
from divflow.operators.field import Field, event_size
from divflow.operators.linearization import Linearization, linearize_field
from divflow.operators.plan import Plan

__all__ = ["Evaluation", "Method", "Prepared", "Refusal"]


class Refusal(NamedTuple):
    """Why a method does not serve a field, such as "not layered: sort has no rule"."""

    reason: str


class Prepared(NamedTuple):
    """A divergence ready to be computed.

    Attributes:
        plan: what is done, why, and at what cost.
        take: computes it, with the value.
        kept: what the next evaluation of the same structure is prepared from.
        settled: whether the search for a cheaper method ends here.
    """

    plan: Callable[[], Plan]
    take: Callable[[], ValueAndDivergence]
    kept: Any = None
    settled: bool = True


class Evaluation:
    """A field at a point whose divergence is wanted.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        chunk_size: basis vectors per pass, if given.
        asked: whether a method was requested by name, which is then used at any cost.

    Attributes:
        followed: the field's evaluation, once there is one.
        states: of the random generators, before the evaluation.
        stateful: whether the field was seen to change itself, so that it must be evaluated only once.
    """

    def __init__(self, g: Field, t: Tensor, x: Tensor, chunk_size: int | None, asked: bool) -> None:
        self.g, self.t, self.x, self.chunk_size, self.asked = g, t, x, chunk_size, asked
        self.followed: Followed | None = None
        self.states: list[Tensor] = []
        self.stateful = False
        self._linearized: Linearization | None = None

    @property
    def size(self) -> int:
        """D, the dimensions of an event."""
        return event_size(self.x)

    @property
    def recompute(self) -> bool:
        """Whether the backward pass computes chunks again, so that its memory is bounded, too."""
        return self.chunk_size is not None

    def linearized(self) -> Linearization:
        """The field's value, ready for products; evaluated first, if necessary."""
        if self.followed is not None:
            return self.followed.field
        if self._linearized is None:
            self._linearized = linearize_field(self.g, self.t, self.x)
        return self._linearized

    def products_per_pass(self, count: int, activations: int = 1) -> int:
        """How many of `count` products one pass takes.

        Args:
            count: of the products.
            activations: elements that the field computes for each element of x.
        """
        return min(self.chunk_size or products_per_pass(self.x, activations), max(count, 1))

    def memory(self, products: int) -> int:
        """The bytes of a pass: each of its products holds about as much as the value's evaluation."""
        elements = self.x.numel() if self.followed is None else self.followed.tape.elements
        return products * elements * self.x.element_size()


class Method(ABC):
    """A way to the exact divergence."""

    name: str

    @abstractmethod
    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared | Refusal:
        """Prepare the divergence of an evaluation, or refuse it.

        Args:
            evaluation: of the field, followed if the method needs that.
            kept: of an earlier evaluation of the same structure.
            verify: whether to compare with autograd what the divergence is computed from; always done if nothing was kept.
        """

"""What a way to the exact divergence is: asked whether it serves an evaluation, it is prepared for it, or says why not."""

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
    """Why a method does not serve, such as "not layered: sort has no rule"."""

    reason: str


class Prepared(NamedTuple):
    """A divergence that is ready to be taken.

    Attributes:
        plan: what is done, why, and at what cost.
        take: computes it, with the value.
        kept: what another evaluation of the same structure is prepared from.
        settled: whether nothing cheaper is to be looked for.
    """

    plan: Callable[[], Plan]
    take: Callable[[], ValueAndDivergence]
    kept: Any = None
    settled: bool = True


class Evaluation:
    """A field at a point, for which a divergence is asked.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        chunk_size: basis vectors a pass, where it is given.
        asked: whether a method was asked for by name: then it is taken at any price.

    Attributes:
        followed: the field's evaluation, once there is one.
        states: of the random generators, before it was evaluated.
        stateful: whether the field was seen to change itself, so that it must be evaluated once.
    """

    def __init__(self, g: Field, t: Tensor, x: Tensor, chunk_size: int | None, asked: bool) -> None:
        self.g, self.t, self.x, self.chunk_size, self.asked = g, t, x, chunk_size, asked
        self.followed: Followed | None = None
        self.states: list[Tensor] = []
        self.stateful = False
        self._linearized: Linearization | None = None

    @property
    def size(self) -> int:
        """D."""
        return event_size(self.x)

    @property
    def recompute(self) -> bool:
        """Whether the backward pass computes chunks again, too, so that memory is bounded there."""
        return self.chunk_size is not None

    def linearized(self) -> Linearization:
        """The field's value, ready for products; evaluated, if that has not been done."""
        if self.followed is not None:
            return self.followed.field
        if self._linearized is None:
            self._linearized = linearize_field(self.g, self.t, self.x)
        return self._linearized

    def products_per_pass(self, count: int, activations: int = 1) -> int:
        """How many of `count` products are taken in one pass.

        Args:
            count: of the products.
            activations: elements that the field makes of each of x's.
        """
        return min(self.chunk_size or products_per_pass(self.x, activations), max(count, 1))

    def memory(self, products: int) -> int:
        """Bytes: each product of a pass holds about what the value's evaluation does."""
        elements = self.x.numel() if self.followed is None else self.followed.tape.elements
        return products * elements * self.x.element_size()


class Method(ABC):
    """A way to the exact divergence."""

    name: str

    @abstractmethod
    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared | Refusal:
        """Prepare the divergence of an evaluation.

        Args:
            evaluation: of the field, followed where the method needs it.
            kept: of an evaluation of the same structure before.
            verify: whether what it is taken from is compared with autograd, as it is where nothing was kept.
        """

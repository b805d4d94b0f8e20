"""Finds the statistics of normalizations in a field (`Take`), and evaluates the field with others in their place (`Put`)."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from divflow.divergence.exact.colored.colors import NotLocal
from divflow.operators.field import Field, event_size, flatten_event
from divflow.tape import NoRule
from divflow.tape.graph import graph_of
from divflow.tape.listening import Listening
from divflow.tape.operation import name_of
from divflow.tape.written import NORMALIZATIONS
from divflow.verification.agreement import require_equal

__all__ = ["Put", "Take", "require_value"]

# A normalization with more statistics than this share of the dimensions is not held: two products each would not pay.
_TOO_MANY = 0.4


class _ByParts(ABC):
    """A listener that computes normalizations from their parts, and passes each statistic through `statistic`.

    Args:
        verify: whether the values of normalizations are compared with torch's own.

    Attributes:
        number: counts the normalizations.
    """

    def __init__(self, verify: bool = False) -> None:
        self._verify, self.number = verify, 0

    @property
    def listening(self) -> Listening:
        """A context within which a field is evaluated."""
        return Listening(self)

    @abstractmethod
    def statistic(self, value: Tensor) -> Tensor:
        """The value to use for a statistic."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a normalization by parts; call any other function unchanged."""
        name = name_of(func)
        if name not in NORMALIZATIONS:
            return func(*args, **kwargs)
        self.number += 1
        try:
            result = NORMALIZATIONS[name](*args, statistic=self.statistic, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (NoRule, RuntimeError, ValueError, TypeError, IndexError):  # called in a way that the parts do not cover
            return func(*args, **kwargs)
        if self._verify:
            require_value(result, func(*args, **kwargs), f"{name} has another value")
        return result


class Take(_ByParts):
    """Records the statistics that depend on x, and leaves them as they are.

    Args:
        x: states `(k, *event)`.
        verify: whether normalizations by parts are compared with torch's own.

    Attributes:
        statistics: the recorded ones, `(k, ...)` each, in the order of their computation.
        chosen: for each statistic of the field, whether it was recorded.
        owners: numbers of the normalizations with recorded statistics.
        refused: number of statistics per sample that depend on x but are too many to hold.
    """

    def __init__(self, x: Tensor, verify: bool) -> None:
        super().__init__(verify)
        self._x = x
        self._start: Node | None = None
        self.statistics: list[Tensor] = []
        self.chosen: list[bool] = []
        self.owners: set[int] = set()
        self.refused = 0

    def value(self, g: Field, t: Tensor, z: Tensor) -> Tensor:
        """The field's value at z; a statistic depends on x if its graph leads to the node of z."""
        self._start = z.grad_fn
        with self.listening:
            return g(t, z)

    def statistic(self, value: Tensor) -> Tensor:
        """Record the statistic if it depends on x, and return it."""
        of_samples = value.shape[:1] == self._x.shape[:1] and value.dtype == self._x.dtype
        varies = of_samples and any(node is self._start for node in graph_of(value))
        count = value.shape[1:].numel()
        self.chosen.append(varies and count < _TOO_MANY * event_size(self._x))
        if self.chosen[-1]:
            self.statistics.append(value)
            self.owners.add(self.number)
        elif varies:
            self.refused += count
        return value


class Put(_ByParts):
    """Replaces the recorded statistics by given ones.

    Args:
        held: the given ones, `(k, n)`.
        take: the record of an earlier evaluation.

    Attributes:
        statistics: those that were replaced, as computed from the state and the given earlier ones.
    """

    def __init__(self, held: Tensor, take: Take) -> None:
        super().__init__()
        self._chosen, self._shapes = iter(take.chosen), [s.shape for s in take.statistics]
        self._held = iter(held.split([shape[1:].numel() for shape in self._shapes], dim=1))
        self.statistics: list[Tensor] = []

    def statistic(self, value: Tensor) -> Tensor:
        """The given value of a recorded statistic; any other as it is."""
        if not next(self._chosen, False):
            return value
        if value.shape != self._shapes[len(self.statistics)]:
            raise NotLocal("it has other statistics at every evaluation")
        self.statistics.append(value)
        return next(self._held).reshape(value.shape)

    def require_all(self) -> None:
        """Check that every given statistic was used.

        Raises:
            NotLocal: some were not, because the field computes other statistics this time.
        """
        if len(self.statistics) < len(self._shapes):
            raise NotLocal("it has other statistics at every evaluation")


def require_value(known: Tensor, true: Tensor, reason: str) -> None:
    """Check that two values agree, with random weights, because the plain sum of normalized values is zero."""
    with torch.no_grad():
        weights = torch.randn(
            true.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
        ).to(true)
        require_equal(flatten_event(known * weights), flatten_event(true * weights), true.dtype, reason)

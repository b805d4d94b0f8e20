"""Statistics of normalizations, while a field is evaluated: which depend on x, and others put in their place."""

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

# Statistics of one normalization, for each dimension, with which it can't pay to hold them.
_TOO_MANY = 0.4


class _ByParts(ABC):
    """While it is listening, normalizations are computed by parts, and each statistic is what a method makes of it.

    Args:
        verify: whether their values are compared with torch's own.

    Attributes:
        number: of the normalization that is computed.
    """

    def __init__(self, verify: bool = False) -> None:
        self._verify, self.number = verify, 0

    @property
    def listening(self) -> Listening:
        """Entered while a field is evaluated."""
        return Listening(self)

    @abstractmethod
    def statistic(self, value: Tensor) -> Tensor:
        """What to take for a statistic."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a normalization by parts, and anything else as ever."""
        name = name_of(func)
        if name not in NORMALIZATIONS:
            return func(*args, **kwargs)
        self.number += 1
        try:
            result = NORMALIZATIONS[name](*args, statistic=self.statistic, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (NoRule, RuntimeError, ValueError, TypeError, IndexError):  # one that the parts are not those of
            return func(*args, **kwargs)
        if self._verify:
            require_value(result, func(*args, **kwargs), f"{name} has another value")
        return result


class Take(_ByParts):
    """Notes the statistics that depend on x, and leaves them as they are.

    Args:
        x: states `(k, *event)`.
        verify: whether normalizations by parts are compared with torch's own.

    Attributes:
        statistics: `(k, ...)` each, in the order in which they are computed.
        chosen: of all statistics, whether they are among these.
        owners: the numbers of the normalizations that have one.
        refused: how many of a sample depend on x, and are too many of one normalization to pay.
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
        """The field's value at z, whose node in the graph tells what depends on it."""
        self._start = z.grad_fn
        with self.listening:
            return g(t, z)

    def statistic(self, value: Tensor) -> Tensor:
        """The statistic itself."""
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
    """Puts others in the place of the statistics that were chosen.

    Args:
        held: `(k, n)`, what to put there.
        take: which were chosen.

    Attributes:
        statistics: what they would have been.
    """

    def __init__(self, held: Tensor, take: Take) -> None:
        super().__init__()
        self._chosen, self._shapes = iter(take.chosen), [s.shape for s in take.statistics]
        self._held = iter(held.split([shape[1:].numel() for shape in self._shapes], dim=1))
        self.statistics: list[Tensor] = []

    def statistic(self, value: Tensor) -> Tensor:
        """The statistic that is held in its place, if one is."""
        if not next(self._chosen, False):
            return value
        if value.shape != self._shapes[len(self.statistics)]:
            raise NotLocal("it has other statistics at every evaluation")
        self.statistics.append(value)
        return next(self._held).reshape(value.shape)

    def require_all(self) -> None:
        """That all were used.

        Raises:
            NotLocal: they were not.
        """
        if len(self.statistics) < len(self._shapes):
            raise NotLocal("it has other statistics at every evaluation")


def require_value(known: Tensor, true: Tensor, reason: str) -> None:
    """That two values are one; weighted, since the sum of what is normalized is zero."""
    with torch.no_grad():
        weights = torch.randn(
            true.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
        ).to(true)
        require_equal(flatten_event(known * weights), flatten_event(true * weights), true.dtype, reason)

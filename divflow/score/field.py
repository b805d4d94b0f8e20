"""A score network as a field g(t, x)."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from divflow.divergence import Field

__all__ = ["Score", "TimeFree", "as_field"]

Score = Callable[..., Tensor]
"""`score(t, x)`, or `score(x)` where the time does not matter; returns a tensor of x's shape."""


class TimeFree(nn.Module):
    """The field g(t, x) = score(x)."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What this field is, for plans to be kept from one call to the next."""
        return (self.score,)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The score at x."""
        return self.score(x)


def as_field(score: Score) -> Field:
    """The score as a function of time and state: itself, or `TimeFree` where it takes the state alone."""
    call = score.forward if isinstance(score, nn.Module) else score
    try:
        signature = inspect.signature(call)
    except ValueError:  # some built-in functions have none
        return score
    return TimeFree(score) if not _takes(signature, 2) and _takes(signature, 1) else score


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True

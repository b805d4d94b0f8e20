"""A score network as a field g(t, x)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from divflow.divergence import Field, FieldError
from divflow.divergence.exact.own import OwnDivergence, own_divergence
from divflow.operators.differentiating import evaluated
from divflow.operators.field import checked_value

__all__ = ["AtTime", "Score", "TimeFree", "as_field", "evaluate", "parameters_of"]

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


class AtTime(nn.Module):
    """The field g(t, x) = score(time, x): a score that was trained at one time, whatever time it is given."""

    def __init__(self, score: Field, time: float) -> None:
        super().__init__()
        self.score, self.time = score, time

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The score at x."""
        return self.score(torch.full_like(t, self.time), x)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The score's own divergence at that time, if it has one."""
        own = own_divergence(self.score)
        return None if own is None else lambda t, x: own(torch.full_like(t, self.time), x)


def as_field(score: Score) -> Field:
    """The score as a function of time and state: itself, or `TimeFree` where it takes the state alone.

    It takes the state alone if one positional argument is required and that is not named t or time.

    Raises:
        FieldError: its signature does not tell.
    """
    parameters = parameters_of(score)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    several = len(required) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if several or (len(positional) >= 2 and positional[0].name in ("t", "time")):
        return score
    if len(required) == 1:
        return TimeFree(score)
    raise FieldError(
        f"can't tell whether {score!r} is score(t, x) or score(x); wrap it, for instance as lambda t, x: score(x)"
    )


def parameters_of(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """The parameters of a function or of a module's `forward`; none where the signature does not tell."""
    inner: Any = function
    while isinstance(inner, nn.Module) and isinstance(getattr(inner, "_orig_mod", None), nn.Module):
        inner = inner._orig_mod  # what torch.compile made of a module hides its signature
    call = inner.forward if isinstance(inner, nn.Module) else inner
    try:
        return list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # no function, or a built-in one
        return []


def evaluate(score: Field, t: Tensor, x: Tensor) -> Tensor:
    """The score's value, refused unless it is of x's shape, dtype and device; t and x are safe from scores that work in place.

    Raises:
        FieldError: naming both shapes, dtypes or devices.
    """
    return checked_value(evaluated(score, t.clone(), x.clone()), x)

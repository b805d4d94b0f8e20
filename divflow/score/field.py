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
"""`score(t, x)`, or `score(x)` if the time does not matter; returns a tensor of x's shape."""


class TimeFree(nn.Module):
    """The field g(t, x) = score(x).

    Args:
        score: of the state alone.
    """

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What identifies this field, for plans to be kept from one call to the next."""
        return (self.score,)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate the score at x."""
        return self.score(x)


class AtTime(nn.Module):
    """The field g(t, x) = score(time, x): a score trained at one time, whatever time it is given.

    Args:
        score: `score(t, x)`.
        time: the time of the training.
    """

    def __init__(self, score: Field, time: float) -> None:
        super().__init__()
        self.score, self.time = score, time

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Evaluate the score at x."""
        return self.score(torch.full_like(t, self.time), x)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The score's own divergence at that time, if it has one."""
        own = own_divergence(self.score)
        return None if own is None else lambda t, x: own(torch.full_like(t, self.time), x)


def as_field(score: Score) -> Field:
    """Return the score as a function of time and state: itself, or `TimeFree` if it takes the state alone.

    It takes the state alone if exactly one positional argument is required and its name is not t or time.

    Args:
        score: `score(t, x)`, or `score(x)`.

    Raises:
        FieldError: its signature is ambiguous.
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
        f"it is not clear whether {score!r} is score(t, x) or score(x). Wrap it, for instance as lambda t, x: score(x)."
    )


def parameters_of(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """Return the parameters of a function or of a module's `forward`; none if it has no readable signature.

    Args:
        function: the function or module.
    """
    inner: Any = function
    while isinstance(inner, nn.Module) and isinstance(getattr(inner, "_orig_mod", None), nn.Module):
        inner = inner._orig_mod  # a compiled module hides its signature
    call = inner.forward if isinstance(inner, nn.Module) else inner
    try:
        return list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # no function, or a built-in one
        return []


def evaluate(score: Field, t: Tensor, x: Tensor) -> Tensor:
    """Evaluate the score, refused unless its value has x's shape, dtype and device; t and x are protected from in-place code.

    Args:
        score: `score(t, x)`.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.

    Raises:
        FieldError: with both shapes, dtypes or devices.
    """
    return checked_value(evaluated(score, t.clone(), x.clone()), x)

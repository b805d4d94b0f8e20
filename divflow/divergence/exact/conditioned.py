"""A function g(t, x, context) with its context bound: a field g(t, x) that keeps its plan when the context's numbers change."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from divflow.divergence.around import Coordinates
from divflow.divergence.exact.own import OwnDivergence, own_divergence
from divflow.operators.context import Context, context_rows, has_rows, mapped, structure
from divflow.operators.differentiating import evaluated
from divflow.operators.field import Field, called, checked_state, checked_value

__all__ = ["Conditioned", "given"]


class Conditioned(nn.Module):
    """The field `g(t, x, context)` as a function of t and x alone; g gets a copy of the context.

    Plans are kept by g and the structure of the context. A closure over a context is another function for each context,
    and is planned anew.

    Args:
        g: called as `g(t, x, context)`.
        context: a tensor or a tree of tensors.
        by_rows: whether each tensor has one row per sample.
    """

    def __init__(self, g: Callable[..., Tensor], context: Context, by_rows: bool = True) -> None:
        super().__init__()
        self.g, self.by_rows = g, by_rows
        # In a tuple, so that a parameter in it, such as a learnt condition, is not registered with this module.
        self._held = (context,)

    @property
    def context(self) -> Context:
        """The context that g receives."""
        return self._held[0]

    @functools.cached_property
    def divflow_identity(self) -> tuple[object, ...]:
        """What identifies this field for plans: not the context's numbers."""
        return self.g, structure(self.context)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The value at time t, `()` or `(k,)`, and state x, in x's dtype."""
        return checked_value(evaluated(self, t, x, functools.partial(self.call, self.g)), x)

    @property
    def value_and_divergence(self) -> OwnDivergence | None:
        """The own divergence of g, if it has one: `value_and_divergence(t, x, context)`."""
        own = own_divergence(self.g)
        return None if own is None else functools.partial(self.call, own)

    def call(self, function: Callable[..., Any], t: Tensor, x: Tensor) -> Any:
        """Call a function of g's with t, x and a copy of the context."""
        return called(function, t, x, mapped(Tensor.clone, self.context))

    @property
    def divflow_nearby(self) -> "Conditioned":
        """The same, of a g that takes points off its manifold as the closest ones, if it is a field on one."""
        return type(self)(getattr(self.g, "divflow_nearby", self.g), self.context)

    def divflow_around(self, x: Tensor, estimated: bool) -> Coordinates | None:
        """The coordinates of g, if it is a field on a manifold."""
        method = getattr(self.g, "divflow_around", None)
        return None if method is None else method(x, estimated)

    @property
    def divflow_rows(self) -> "Callable[[list[int]], Conditioned] | None":
        """Make the field for some samples of the batch; None if its context does not consist of rows."""
        return self._of_rows if self.by_rows else None

    def _of_rows(self, rows: list[int]) -> "Conditioned":
        return Conditioned(self.g, context_rows(self.context, rows))


def given(g: Callable[..., Tensor], context: Context | None, x: Tensor) -> Field:
    """Bind a context, if there is one, to a function.

    The result is the field g(t, x), or g(t, x, context). The context need not have rows: nothing is evaluated in parts.

    Args:
        g: called as `g(t, x)` or `g(t, x, context)`.
        context: a tensor or a tree of tensors, or None.
        x: states `(k, *event)`.

    Raises:
        FieldError: a leaf of the context that is not a tensor.
    """
    return g if context is None else Conditioned(g, context, has_rows(context, len(checked_state(x))))

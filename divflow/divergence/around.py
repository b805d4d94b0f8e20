"""Fields on a manifold: near a point, the field of plain coordinates whose ordinary divergence is theirs there.

A field on a manifold has a method `divflow_around` (`OnManifold`). Estimators differentiate what it returns, so that none of
them knows a manifold.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from divflow.operators.differentiating import evaluated
from divflow.operators.field import Field, checked_state, checked_value

__all__ = ["Around", "Coordinates", "OnManifold", "around"]


class Coordinates(NamedTuple):
    """Plain coordinates near points of a manifold.

    Attributes:
        points: on the manifold, `(k, *event)`.
        function: `function(points, t, y, *context)` is the field in these coordinates, of y's shape `(k, *own)`.
        origin: the coordinates y of the points, `(k, *own)`.
        ambient: maps a value in these coordinates, `(k, *own)`, to the field's value `(k, *event)`; None if they are the same.
        own: `own(points, t, y, *context)` is that value and the divergence, if the field knows its own; else None.
    """

    points: Tensor
    function: Callable[..., Tensor]
    origin: Tensor
    ambient: Callable[[Tensor], Tensor] | None = None
    own: Callable[..., tuple[Tensor, Tensor]] | None = None


class OnManifold(Protocol):
    """A field on a manifold, or one with a context bound to it."""

    def divflow_around(self, x: Tensor, estimated: bool) -> Coordinates | None:
        """Return coordinates near x in which the ordinary divergence of the field is its divergence on the manifold.

        Args:
            x: `(k, *event)`.
            estimated: whether random vectors of x's shape are going to be multiplied, of which only the tangent part is to count.
        """

    @property
    def divflow_nearby(self) -> Field:
        """The same field, which takes points off the manifold as the closest ones."""

    def call(self, function: Callable[..., Any], t: Tensor, x: Tensor) -> Any:
        """Call a function of the field's with t, x and what is bound to it."""


class Around(nn.Module):
    """A field on a manifold in coordinates near given points.

    Args:
        g: the field.
        function: of the `Coordinates`.
        points: of the `Coordinates`.
        own: of the `Coordinates`.
    """

    def __init__(
        self,
        g: OnManifold,
        function: Callable[..., Tensor],
        points: Tensor,
        own: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.g, self.function, self.own = g, function, own
        # In a tuple, so that a parameter is not registered with this module.
        self._held = (points,)

    @property
    def divflow_identity(self) -> tuple[object, ...]:
        """What identifies this field, for plans to be kept: not the points."""
        return self.g, self.function

    @property
    def divflow_rows(self) -> "Callable[[list[int]], Around] | None":
        """Make the field for some samples of the batch; None if what is bound to it does not consist of rows."""
        of_rows: Callable[[list[int]], OnManifold] | None = getattr(self.g, "divflow_rows", lambda rows: self.g)
        if of_rows is None:
            return None
        return lambda rows: Around(of_rows(rows), self.function, self._held[0][rows], self.own)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The value at time t, `()` or `(k,)`, and coordinates y `(k, *own)`."""
        return checked_value(evaluated(self, t, y, functools.partial(self._call, self.function)), y)

    @property
    def value_and_divergence(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """The field's own divergence, if it has one."""
        return None if self.own is None else functools.partial(self._call, self.own)

    def _call(self, function: Callable[..., Any], t: Tensor, y: Tensor) -> Any:
        return self.g.call(functools.partial(function, self._held[0].clone()), t, y)


def around(g: Field, x: Tensor, estimated: bool) -> tuple[Field, Coordinates] | None:
    """Return a field on a manifold in coordinates near x, and these; None for any other field.

    Args:
        g: the field.
        x: states `(k, *event)`.
        estimated: as of `OnManifold.divflow_around`.
    """
    method = getattr(g, "divflow_around", None)
    if method is None:
        return None
    coordinates = method(checked_state(x), estimated)
    if coordinates is None:
        return None
    return Around(cast(OnManifold, g), coordinates.function, coordinates.points, coordinates.own), coordinates

"""Tangent fields of any network, whose divergence is the one of the manifold."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from divflow.divergence import FieldError
from divflow.divergence.around import Coordinates
from divflow.divergence.check import fresh_copy
from divflow.divergence.exact.own import OwnDivergence, own_divergence
from divflow.errors import listed_rows
from divflow.manifolds.laws import check_laws
from divflow.manifolds.manifold import Manifold, ManifoldError, check_manifold
from divflow.operators.field import accumulation_dtype, checked_value, event_size, flatten_event
from divflow.operators.linearization import linearize
from divflow.operators.transformed import transformed

__all__ = ["TangentField"]


class TangentField(nn.Module):
    """The tangent field that any field u of ambient coordinates makes on a manifold.

        v(t, x) = P_x u(t, x)    with the orthogonal projection P_x to the tangent space at x

    Every estimator of divflow gives its divergence on the manifold,

        div v = sum_i <e_i, D_i v> = tr(P_x Du) + <H(x), u>    over an orthonormal basis e_i of the tangent space at x

    where H is the manifold's `mean_curvature`, -d x on the sphere of dimension d, so that there

        div v = tr Du - x^T (Du) x - d x . u

    - On a sphere `Exact` takes a closed form of u where it finds one, and one product more.
    - On a torus it is the ordinary divergence of u.
    - On SO(3) it takes three products.
    - On a manifold of your own without `mean_curvature` it is the ordinary divergence of v(t, pi(x)), with pi the closest point.
    - Random probes count with their tangent part alone.

    At x off the manifold the field is that of the closest point, v(t, pi(x)), as a solver needs it. A divergence is refused there.

    Args:
        field: `u(t, x)` or `u(t, x, context)`, a module or function of points `(k, *event)` and a time `()` or `(k,)`. It returns vectors in
            ambient coordinates, `(k, *event)`. On a torus it must have the torus's period.
        manifold: of the points.
        tangent: True declares that u is tangent already; then it is checked in place of projected.
        checked: False takes points off the manifold as the closest ones, also where a divergence is wanted.

    Raises:
        ManifoldError: no manifold; at a divergence, points off the manifold, or with `tangent` vectors that are not.

    Example:
        >>> from divflow.divergence import divergence
        >>> from divflow.manifolds import Sphere
        >>> field = TangentField(lambda t, x: torch.tensor([0.0, 0.0, 1.0]).expand_as(x), Sphere(2))  # to the north pole
        >>> divergence(field, 0.0, torch.tensor([[0.0, 0.0, 1.0], [0.8, 0.0, 0.6]]))
        tensor([-2.0000, -1.2000])
    """

    def __init__(
        self, field: Callable[..., Tensor], manifold: Manifold, *, tangent: bool = False, checked: bool = True
    ) -> None:
        super().__init__()
        check_manifold(manifold)
        self.field, self.manifold, self.tangent, self.checked = field, manifold, tangent, checked

    def forward(self, t: Tensor, x: Tensor, *context: Any) -> Tensor:
        """The value at time t, `()` or `(k,)`, and points x `(k, *event)`."""
        point = self.manifold.project(x)
        return self.manifold.to_tangent(point, checked_value(self.field(t, point, *context), x))

    @property
    def divflow_nearby(self) -> "TangentField":
        """The same field, which takes points off the manifold as the closest ones everywhere."""
        return TangentField(self.field, self.manifold, tangent=self.tangent, checked=False)

    @property
    def finest_scale(self) -> Callable[[Tensor], Tensor] | None:
        """That of the field, if it has one (`ProbabilityFlow.finest_scale`)."""
        return getattr(self.field, "finest_scale", None)

    def check_period(self, t: Tensor | float, x: Tensor, *context: Any) -> None:
        """Refuse a field that has another value at other coordinates of the same points, such as angles a period apart.

        Args:
            t: time, `()` or `(k,)`.
            x: points `(k, *event)`.
            *context: as the field takes it.

        Raises:
            ManifoldError: with both values and the remedy.
        """
        same = self.manifold.again(x)
        if same is None or not x.numel():
            return
        # A copy whose parameters are not zero, as those of a last layer may be at first.
        field, _ = fresh_copy(self.field)
        with torch.no_grad():
            t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
            values = [field(t.clone(), points.clone(), *context) for points in (x, same)]
        first, second = (flatten_event(value.detach()) for value in values)
        apart = (first - second).abs().amax(dim=1)
        bad = apart > 1e2 * torch.finfo(x.dtype).eps ** 0.5 * first.abs().amax()
        if bad.any():
            row = int(apart.argmax())
            column = int((first - second)[row].abs().argmax())
            raise ManifoldError(
                f"the field is not one on {self.manifold}: at {x[row].tolist()} its entry {column} is {first[row, column].item():.6g}, and "
                f"{second[row, column].item():.6g} at {same[row].tolist()}, the same point ({listed_rows(bad)}). Give the network sines and "
                "cosines of the angles, as MLP(..., features=PeriodicFeatures(...)) does."
            )

    def call(self, function: Callable[..., Any], t: Tensor, x: Tensor) -> Any:
        """Call a function of t and x."""
        return function(t, x)

    def divflow_around(self, x: Tensor, estimated: bool) -> Coordinates:
        """Return coordinates in which the ordinary divergence is the one on the manifold, as of `OnManifold`."""
        if x.shape[1:] != self.manifold.event_shape:
            raise FieldError(
                f"points of {self.manifold} have shape {tuple(self.manifold.event_shape)}, so x must have shape "
                f"(k, {', '.join(map(str, self.manifold.event_shape))}), but has {tuple(x.shape)}"
            )
        if self.checked and not transformed():
            self.manifold.check(x)
        if not transformed():
            check_laws(self.manifold, x)
        points = self.manifold.project(x)
        if self.manifold.flat:
            return Coordinates(points, self._flat, points, own=self._own(self._own_flat))
        if self.manifold.mean_curvature(points) is None:
            return Coordinates(points, self._projected_tangent if estimated else self._projected, points)
        if not estimated and (tangents := self.manifold.tangents(points)) is not None:
            origin = points.new_zeros(len(points), self.manifold.dim)
            return Coordinates(points, self._in_frame, origin, lambda value: _combine(value, tangents))
        own = None if estimated or self.manifold.normals(points) is None else self._own(self._own_curved)
        return Coordinates(points, self._curved_tangent if estimated else self._curved, points, own=own)

    def _flat(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        return self.field(t, y, *context)

    def _curved(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        """P u(t, y) + <H, u> (y - x) / n, whose value at y = x is P u, and whose trace is that of P Du and <H, u>."""
        return self.manifold.around(points, self._value(points, t, y, *context), y)

    def _curved_tangent(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        """The same of u(t, x + P (y - x)): the Jacobian is P Du P + <H, u> / n, of which a probe sees its tangent part."""
        moved = points + self.manifold.to_tangent(points, y - points)
        return self.manifold.around(points, self._value(points, t, moved, *context), y)

    def _in_frame(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        """The coefficients <e_i, u(t, x + sum_j y_j e_j)> + <H, u> y_i / d of a tangent basis, `(k, d)`."""
        tangents, curvature = self.manifold.tangents(points), self.manifold.mean_curvature(points)
        assert tangents is not None
        assert curvature is not None
        value = self._value(points, t, points + _combine(y, tangents), *context)
        along = flatten_event(value * tangents, 2).sum(dim=-1).T
        return along + _inner(curvature, value)[:, None] / self.manifold.dim * y

    def _projected(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        """v(t, pi(y))."""
        closest = self.manifold.project(y)
        return self.manifold.to_tangent(closest, self._value(closest, t, closest, *context))

    def _projected_tangent(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        """P v(t, pi(x + P (y - x))), whose Jacobian is the tangent part of that of v(t, pi(y))."""
        moved = points + self.manifold.to_tangent(points, y - points)
        return self.manifold.to_tangent(points, self._projected(points, t, moved, *context))

    def _own(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]] | None:
        return None if own_divergence(self.field) is None else function

    def _own_flat(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        return self._known(t, y, *context)

    def _own_curved(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """The field's own divergence, without the n^T (Du) n of the normals n."""
        value, divergence = self._known(t, y, *context)
        normals, curvature = self.manifold.normals(points), self.manifold.mean_curvature(points)
        assert normals is not None
        assert curvature is not None
        field = linearize(lambda x: self.field(t, x, *context), y, checked_value)
        along = field.pullback(torch.cat([normals, curvature[None]]))
        normal = flatten_event(along[:-1] * normals, 2).sum(dim=(0, 2), dtype=accumulation_dtype(y))
        # The last term is zero at y = x, but not its derivative in y.
        bent = _inner(curvature, value) + _inner(along[-1], y - points) / event_size(points)
        return self.manifold.around(points, value, y), divergence - normal + bent

    def _known(self, t: Tensor, y: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        own: OwnDivergence | None = own_divergence(self.field)
        assert own is not None
        return own(t, y, *context)

    def _value(self, points: Tensor, t: Tensor, y: Tensor, *context: Any) -> Tensor:
        value = checked_value(self.field(t, y, *context), y)
        if self.tangent and not transformed():
            self.manifold.check_tangent(points, value)
        return value


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return flatten_event(a * b).sum(dim=1, dtype=accumulation_dtype(a))


def _combine(coefficients: Tensor, tangents: Tensor) -> Tensor:
    """The vectors sum_i c_i e_i, `(k, *event)`, of coefficients `(k, d)` and basis vectors `(d, k, *event)`."""
    return torch.einsum("ki,ik...->k...", coefficients, tangents)

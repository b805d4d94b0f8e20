"""What a manifold is: a closest point, a tangent projection, and where they are known its geodesics and densities."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from divflow.errors import DivflowError, listed_rows
from divflow.operators.transformed import forward_mode

__all__ = ["Manifold", "ManifoldError", "check_manifold"]


class ManifoldError(DivflowError, ValueError):
    """A point is off its manifold, or a manifold is asked for something that it does not have."""


class Manifold(ABC):
    """A manifold in an ambient space R^n of tensors of shape `event_shape`.

    Write your own by implementing `project` and `to_tangent`. Geodesics and densities are optional: a method that is not
    implemented raises a `ManifoldError`.

    All methods take batches: a point is `(*batch, *event_shape)`, and so is a tangent vector at it, in ambient coordinates.
    Distances and volumes are those of the ambient Euclidean metric unless a class states another.

    Attributes:
        event_shape: of a point in ambient coordinates.
        dim: d, the dimension of the manifold itself.
    """

    event_shape: Size
    dim: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}(event_shape={tuple(self.event_shape)}, dim={self.dim})"

    def __eq__(self, other: object) -> bool:
        """Whether both are described in the same words: manifolds of one class with other settings need a `__repr__` with these."""
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def config(self) -> dict[str, Any]:
        """Plain values from which it is built again: `_target_`, the class, and its arguments.

        Arguments are attributes of the same names.

        Raises:
            ManifoldError: an argument is no attribute.
        """
        names = inspect.signature(type(self)).parameters
        if lacking := [name for name in names if not hasattr(self, name)]:
            raise ManifoldError(
                f"{type(self).__name__} keeps no attribute {lacking[0]!r}, its argument, so that a checkpoint can't describe it; set "
                f"self.{lacking[0]} in its __init__, or write its method config"
            )
        return {
            "_target_": f"{type(self).__module__}.{type(self).__qualname__}",
            **{name: getattr(self, name) for name in names},
        }

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The closest point of the manifold."""

    @abstractmethod
    def to_tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """The orthogonal projection of ambient vectors u to the tangent space at x; linear in u."""

    @property
    def flat(self) -> bool:
        """Whether every vector is tangent at every point, as on tori, so that divergences are the ordinary ones."""
        return False

    def mean_curvature(self, x: Tensor) -> Tensor | None:
        """The normal vector H = sum_i of D_i e_i over a tangent basis, by which div P u = tr(P Du) + H . u.

        `(*batch, *event_shape)`; None if it is unknown. Divergences then take derivatives of `project`.
        """
        return None

    def around(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """The vectors P_x u + <H(x), u> (y - x) / n near x, where u are ambient vectors at y.

        At y = x this is the tangent part of u, and its ordinary divergence in y is that of the tangent field on the manifold.
        """
        curvature = self.mean_curvature(x)
        if curvature is None:
            raise self._lacks("mean_curvature")
        dims = tuple(range(x.ndim - len(self.event_shape), x.ndim))
        rate = (curvature * u).sum(dim=dims, keepdim=True) / self.event_shape.numel()
        return self.to_tangent(x, u) + rate * (y - x)

    def normals(self, x: Tensor) -> Tensor | None:
        """An orthonormal basis of the vectors normal to the manifold at x, `(codimension, *batch, *event_shape)`; None if unknown."""
        return None

    def tangents(self, x: Tensor) -> Tensor | None:
        """An orthonormal basis of the tangent space at x that depends smoothly on it, `(dim, *batch, *event_shape)`.

        None if there is none, as on the sphere. With it an exact divergence takes `dim` products, whatever the network is.
        """
        return None

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The point that a geodesic from x with initial velocity u reaches in one unit of time."""
        raise self._lacks("exp")

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The initial velocity of the shortest geodesic from x that reaches y in one unit of time."""
        raise self._lacks("log")

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The length of the shortest geodesic between x and y, `(*batch,)`, to which their batches are broadcast."""
        raise self._lacks("distance")

    def geodesic(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Follow a shortest geodesic from x at t = 0 to y at t = 1, at constant speed.

        If several are as short, it is one of them. By default it is exp(x, t log(x, y)), differentiated in t by forward mode: an `exp`
        without forward derivatives needs a `geodesic` of its own.

        Args:
            x: `(*batch, *event_shape)`.
            y: `(*batch, *event_shape)`.
            t: `()` or `(*batch,)`.

        Returns:
            The point at time t, and the velocity there, a tangent vector.
        """
        u = self.log(x, y)
        t = t.expand(u.shape[: u.ndim - len(self.event_shape)]).contiguous()
        with forward_mode():
            return torch.func.jvp(lambda s: self.exp(x, self._spread(s) * u), (t,), (torch.ones_like(t),))[:2]

    @property
    def volume(self) -> float:
        """The Riemannian volume of the whole manifold."""
        raise self._lacks("volume")

    def uniform(self, dtype: torch.dtype | None = None) -> Distribution:
        """The uniform density with respect to the volume.

        Args:
            dtype: of the samples; torch's default dtype if None.
        """
        raise self._lacks("uniform")

    def wrapped_normal(self, mean: Tensor, std: Tensor | float) -> Distribution:
        """The density of exp(mean, v) with respect to the volume, where v is normal in the tangent space at the mean.

        Args:
            mean: `(*batch, *event_shape)`.
            std: standard deviation of v along each direction, a number or `(*batch,)`.
        """
        raise self._lacks("wrapped_normal")

    def scale(self, like: Tensor) -> Tensor | float:
        """What lengths of ambient tangent vectors are multiplied by to be those of the manifold: 1, a number or `event_shape`.

        Args:
            like: a tensor of the dtype and device.
        """
        return 1.0

    def base(self, dtype: torch.dtype | None = None) -> Distribution:
        """The density that flows start from unless another is given: the uniform one.

        Args:
            dtype: of the samples; torch's default dtype if None.
        """
        return self.uniform(dtype)

    def again(self, x: Tensor) -> Tensor | None:
        """Other coordinates of the same points, such as angles a period apart; None if points have one tensor each."""
        return None

    def off(self, x: Tensor) -> Tensor:
        """How far points are from the manifold, `(*batch,)`, in units of the largest ambient entry."""
        away = (x - self.project(x)).abs()
        return away.flatten(x.ndim - len(self.event_shape)).amax(dim=-1) if self.event_shape else away

    def check(self, x: Tensor, tolerance: float | None = None) -> Tensor:
        """Return x, refused unless all its points lie on the manifold.

        Args:
            x: `(*batch, *event_shape)`.
            tolerance: the largest distance that counts as rounding; the square root of the dtype's precision if None.

        Raises:
            ManifoldError: another shape or dtype, NaN, or points off the manifold; the message names rows and distance.
        """
        shape = tuple(self.event_shape)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise ManifoldError(
                f"points of {self} must be a tensor of a floating dtype, but are {got}; convert them, for instance by x.float()"
            )
        if tuple(x.shape[x.ndim - len(shape) :]) != shape or x.ndim < len(shape):
            raise ManifoldError(
                f"points of {self} have shape {shape} after the batch, but x has shape {tuple(x.shape)}"
            )
        rows = x.detach().reshape(-1, *shape)
        finite = rows.reshape(len(rows), -1).isfinite().all(dim=1)
        if not finite.all():
            raise ManifoldError(f"points of {self} are NaN or infinite in {listed_rows(~finite)}; leave these rows out")
        self._check_finite(rows, torch.finfo(x.dtype).eps ** 0.5 if tolerance is None else tolerance)
        return x

    def check_tangent(self, x: Tensor, u: Tensor, tolerance: float | None = None) -> Tensor:
        """Return u, refused unless its vectors are tangent at x.

        Args:
            x: points `(*batch, *event_shape)`.
            u: vectors `(*batch, *event_shape)`.
            tolerance: the largest normal part that counts as rounding, relative to the largest entry of a vector; the square root of the
                dtype's precision if None.

        Raises:
            ManifoldError: with the rows and their normal part.
        """
        event = len(self.event_shape)
        entries = [part.abs().flatten(u.ndim - event).amax(dim=-1) for part in (u - self.to_tangent(x, u), u)]
        relative = (entries[0] / entries[1].clamp(min=torch.finfo(u.dtype).tiny)).detach().flatten()
        bad = ~(relative <= (torch.finfo(u.dtype).eps ** 0.5 if tolerance is None else tolerance))
        if bad.any():
            raise ManifoldError(
                f"vectors are not tangent to {self} in {listed_rows(bad)}: up to {relative[bad].nan_to_num(torch.inf).max().item():.3g} of them "
                "is normal to it; take manifold.to_tangent(x, u) if their tangent part is meant"
            )
        return u

    def _check_finite(self, rows: Tensor, tolerance: float) -> None:
        # Far from the manifold the closest point may not exist, and is NaN.
        off = self.off(rows)
        bad = ~(off <= tolerance)
        if bad.any():
            furthest = off[bad].nan_to_num(torch.inf).max().item()
            raise ManifoldError(
                f"points are off {self} by up to {furthest:.3g} in {listed_rows(bad)}; check their units and order, and use "
                "manifold.project(x) if the closest points are meant"
            )

    def _spread(self, t: Tensor) -> Tensor:
        """Numbers `(*batch,)`, to multiply points."""
        return t[(..., *[None] * len(self.event_shape))]

    def _lacks(self, name: str) -> ManifoldError:
        return ManifoldError(
            f"{type(self).__name__} has no {name}; implement it in the class, or use a manifold of divflow.manifolds"
        )


def check_manifold(manifold: Manifold) -> None:
    """Refuse what is no manifold.

    Args:
        manifold: what was received.

    Raises:
        ManifoldError: with the value.
    """
    if not isinstance(manifold, Manifold):
        raise ManifoldError(
            f"manifold must be one of divflow.manifolds, such as Sphere(2), or derive from Manifold, but is {manifold!r}"
        )

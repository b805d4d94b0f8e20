"""Directions: unit spheres of any dimension."""

import math

import torch
from torch import Size, Tensor

from divflow.errors import check_count, listed_rows
from divflow.manifolds.densities import log_wrapped_radial
from divflow.manifolds.manifold import ManifoldError
from divflow.manifolds.series import arcsine_ratio, cosine, sine_ratio
from divflow.manifolds.symmetric import Symmetric

__all__ = ["Sphere"]


class Sphere(Symmetric):
    """The unit sphere |x| = 1 in R^(d+1); `Sphere(2)` is the surface of a ball.

    Args:
        d: dimension of the sphere itself, at least 1.

    Example:
        >>> Sphere(2).distance(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
        tensor(1.5708)
    """

    def __init__(self, d: int) -> None:
        check_count("d", d)
        self.d = self.dim = d
        self.event_shape = Size([d + 1])

    def __repr__(self) -> str:
        return f"Sphere({self.dim})"

    def project(self, x: Tensor) -> Tensor:
        """The direction x / |x|; NaN at zero, which has no closest point."""
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def to_tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """The projection u - x (x . u)."""
        return u - x * _dot(x, u)

    def mean_curvature(self, x: Tensor) -> Tensor:
        """The vector -d x."""
        return -self.dim * x

    def around(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """As `Manifold.around`, by a single product x . u."""
        return u - _dot(x, u) * (x + self.dim / (self.dim + 1) * (y - x))

    def normals(self, x: Tensor) -> Tensor:
        """The point itself, `(1, *batch, d + 1)`."""
        return x[None]

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """cos|u| x + sin|u| u / |u|, smooth at u = 0."""
        q = _dot(u, u)
        return cosine(q) * x + sine_ratio(q) * u

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The angle between x and y along the tangent direction to y, smooth at y = x.

        Raises:
            ManifoldError: y = -x up to rounding, where every direction leads.
        """
        w, antipodal = self._towards(x, y)
        if antipodal.any():
            raise ManifoldError(
                f"the points of a pair are antipodal in {listed_rows(antipodal.flatten())}, so that every direction is a shortest way; move one "
                "of them, or leave the pair out"
            )
        return arcsine_ratio(_dot(w, w), _dot(x, y)) * w

    def geodesic(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The arc of a great circle; between antipodal points, where `log` refuses, it is one of all these half circles."""
        w, antipodal = self._towards(x, y)
        if antipodal.any():
            # The coordinate axis that is the furthest from x, as far from antipodal as is told from it.
            axis = torch.nn.functional.one_hot(x.abs().argmin(dim=-1), x.shape[-1]).to(x)
            aside = 8 * torch.finfo(x.dtype).eps * self.project(self.to_tangent(x, axis))
            w = torch.where(antipodal[..., None], aside, w)
        v, t = arcsine_ratio(_dot(w, w), _dot(x, y)) * w, self._spread(t)
        q = _dot(v, v)
        cos, sin = cosine(t.square() * q), t * sine_ratio(t.square() * q)
        return cos * x + sin * v, cos * v - q * sin * x

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The angle between x and y in radians, exact to rounding at 0 and pi.

        At both ends it has no derivative, and autograd returns zero.

        The formula is 2 atan2(|x - y|, |x + y|) (Kahan 2006).
        """
        return 2 * torch.atan2(torch.linalg.vector_norm(x - y, dim=-1), torch.linalg.vector_norm(x + y, dim=-1))

    def _towards(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The projection of y - x to the tangent space at x, and which pairs are antipodal up to rounding."""
        # Of y - x and not of y, since less cancels; once more, since near -x little is left beside its rounding.
        w = self.to_tangent(x, self.to_tangent(x, y - x))
        near = _dot(w, w) <= (8 * torch.finfo(w.dtype).eps) ** 2
        return w, (near & (_dot(x, y) < 0)).squeeze(-1)

    @property
    def volume(self) -> float:
        """2 pi^((d+1)/2) / Gamma((d+1)/2)."""
        half = (self.dim + 1) / 2
        return 2 * math.exp(half * math.log(math.pi) - math.lgamma(half))

    def draw_uniform(self, shape: Size, like: Tensor) -> Tensor:
        """Independent uniform points."""
        return self.project(torch.randn(shape + self.event_shape, dtype=like.dtype, device=like.device))

    def draw_tangent(self, x: Tensor) -> Tensor:
        """Standard normal tangent vectors at x."""
        return self.to_tangent(x, torch.randn_like(x))

    def log_wrapped_normal(self, mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
        """The density of exp(mean, v), v ~ N(0, std^2) in the tangent space, with all windings of its geodesics.

            p(x) = sum_k |r_k|^(d-1) / sin(r)^(d-1) (2 pi std^2)^(-d/2) exp(-r_k^2 / (2 std^2)),    r_k = r + 2 pi k

        where r is the distance to the mean, and negative r_k come by the other way round. For d > 1 it is infinite at the mean's
        antipode, and by k != 0 at the mean, where many geodesics meet: so is the true density.
        """
        w = self.to_tangent(mean, x - mean)
        return log_wrapped_radial(_dot(w, w).squeeze(-1), _dot(mean, x).squeeze(-1), std, self.dim, radius=1.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)

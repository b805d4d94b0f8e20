"""Whether a manifold of one's own is one: its projections are compared with central differences, once for each class."""

import weakref

import torch
from torch import Tensor

from divflow.manifolds.manifold import Manifold, ManifoldError

__all__ = ["check_laws"]

_POINTS, _STEP, _TOLERANCE = 2, 1e-5, 1e-4
# Classes that passed.
_LAWFUL: weakref.WeakSet[type] = weakref.WeakSet()


@torch.no_grad()
def check_laws(manifold: Manifold, x: Tensor) -> None:
    """Refuse a manifold whose methods do not fit together, by which divergences would be wrong.

    - `to_tangent(x, u)` is an orthogonal projection to `dim` directions.
    - `project` is the closest point: its derivative at a point of the manifold is that projection.
    - `mean_curvature`, `normals` and `tangents`, if there are some, are what they are called.

    Those of divflow are taken as tested. The comparison is in float64; a manifold that can't compute in it is not compared.

    Args:
        manifold: to be checked, once for its class.
        x: points of it, `(k, *event)`.

    Raises:
        ManifoldError: with the law that is broken.
    """
    if type(manifold) in _LAWFUL or type(manifold).__module__.startswith("divflow.") or not len(x):
        return
    try:
        # Brought to the manifold in float64, since x has only the digits of its dtype.
        points = manifold.project(x[:_POINTS].detach().double())
        broken = _broken(manifold, points)
    except (RuntimeError, NotImplementedError):
        return
    if broken:
        raise ManifoldError(f"{manifold} is no manifold with these methods: {broken}")
    _LAWFUL.add(type(manifold))


def _broken(manifold: Manifold, x: Tensor) -> str:
    """The first law that is broken; empty if none is."""
    size, count = manifold.event_shape.numel(), len(x)
    basis = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *manifold.event_shape).expand(size, *x.shape)
    around = x.expand_as(basis)
    projection = _matrix(manifold.to_tangent(around, basis))
    if _differ(projection @ projection, projection) or _differ(projection, projection.mT):
        return "to_tangent is no orthogonal projection"
    rank = projection.diagonal(dim1=1, dim2=2).sum(dim=1)
    if _differ(rank, torch.full_like(rank, manifold.dim)):
        return f"to_tangent projects to {rank[0]:.3g} directions, but dim is {manifold.dim}"
    moved = [manifold.project(around + step * basis) for step in (_STEP, -_STEP)]
    if _differ(_matrix((moved[0] - moved[1]) / (2 * _STEP)), projection):
        return "the derivative of project at a point of the manifold is not to_tangent, so that it is not the closest point"
    curvature = manifold.mean_curvature(x)
    if curvature is not None:
        # Of the field P a with a constant a the divergence is <H, a>.
        values = [
            manifold.to_tangent(
                points[:, None], basis[:, None, :1].transpose(0, 1).expand(size, size, count, *x.shape[1:])
            )
            for points in moved
        ]
        slopes = ((values[0] - values[1]) / (2 * _STEP)).flatten(3)
        divergence = slopes.diagonal(dim1=0, dim2=3).sum(dim=-1).T
        if _differ(divergence, curvature.flatten(1)):
            return "mean_curvature is not the sum of the derivatives of to_tangent"
    for name, tangent in (("tangents", True), ("normals", False)):
        vectors = getattr(manifold, name)(x)
        if vectors is None or not len(vectors):
            continue
        flat = vectors.flatten(2).movedim(0, 1)
        own = projection @ flat.mT
        identity = torch.eye(flat.shape[1], dtype=x.dtype, device=x.device).expand(count, -1, -1)
        if _differ(flat @ flat.mT, identity) or _differ(own, flat.mT if tangent else torch.zeros_like(own)):
            return f"{name} are no orthonormal basis of the {'tangent' if tangent else 'normal'} space"
    return ""


def _matrix(columns: Tensor) -> Tensor:
    """Matrices `(k, n, n)` of what a linear map makes of each basis vector, `(n, k, *event)`."""
    return columns.flatten(2).permute(1, 2, 0)


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)

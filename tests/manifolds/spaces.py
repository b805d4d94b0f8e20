"""The manifolds that laws are checked of, and points on them."""

import torch

from divflow.manifolds import Euclidean, Manifold, Product, SpecialOrthogonal, Sphere, Torus

SYMMETRIC = {
    "circle": Sphere(1),
    "sphere": Sphere(2),
    "directions": Sphere(6),
    "radians": Torus(3),
    "degrees": Torus(2, period=360),
    "rotations": SpecialOrthogonal(),
}
MANIFOLDS: dict[str, Manifold] = {
    **SYMMETRIC,
    "plane": Euclidean(2),
    "product": Product(direction=Sphere(2), orientation=SpecialOrthogonal(), angles=Torus(2), place=Euclidean(3)),
}


def points(manifold: Manifold, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Points of any manifold here: the closest ones to normal draws, of positive determinant."""
    x = torch.randn(count, *manifold.event_shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if isinstance(manifold, Product):
        return manifold.join(
            {name: points(part, count, seed + 1 + i, dtype) for i, (name, part) in enumerate(manifold.parts.items())}
        )
    if isinstance(manifold, SpecialOrthogonal):
        x = x * torch.linalg.det(x).sign()[:, None, None]
    return manifold.project(x)

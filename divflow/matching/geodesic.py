"""Paths along the geodesics of a manifold."""

from dataclasses import dataclass

from torch import Generator, Tensor

from divflow.distributions.noise import drawn_like
from divflow.manifolds import Manifold
from divflow.manifolds.manifold import check_manifold
from divflow.matching.path import Path, PathPoint

__all__ = ["GeodesicPath"]


@dataclass(frozen=True)
class GeodesicPath(Path):
    """Shortest geodesics from noise to data at constant speed: flow matching on a manifold.

        x_t = exp_{x_1}((1 - t) log_{x_1} x_0)

    (Chen & Lipman 2024, arXiv:2302.03660, section 3.2). The velocity is the closed form of its derivative, tangent at x_t and as long as
    the distance from x_0 to x_1; in Euclidean space it is that of `LinearPath`.

    - Where several ways are as short (antipodal points of a sphere, half a turn of a rotation or an angle), one of them is taken. Such pairs
      have probability zero.
    - The noise of the objective is the manifold's `base` if it is given none: uniform, and standard normal in Euclidean parts.
    - A manifold of your own needs `exp` and `log`. The velocity is then a derivative of `exp` by forward mode, or what its own `geodesic` returns.

    Args:
        manifold: such as `Sphere(2)`.

    Raises:
        ManifoldError: the manifold is none; when called, noise or data lie off it, or it has no `exp` or `log`.

    Example:
        >>> import torch
        >>> from divflow.manifolds import Torus
        >>> point = GeodesicPath(Torus(1, period=360))(torch.tensor(0.5), torch.tensor([[170.0]]), torch.tensor([[-170.0]]))
        >>> point.x, point.velocity
        (tensor([[-180.]]), tensor([[20.]]))
    """

    manifold: Manifold

    def __post_init__(self) -> None:
        check_manifold(self.manifold)

    def __call__(self, t: Tensor, noise: Tensor, data: Tensor) -> PathPoint:
        """Compute the point and the velocity, as `Path`."""
        noise, data = self.manifold.check(noise), self.manifold.check(data)
        # From the datum, so that it is met exactly at t = 1, where likelihoods start.
        point, backwards = self.manifold.geodesic(data, noise, (1 - t).to(data.dtype))
        return PathPoint(point, -backwards)

    def noise(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw noise of the manifold's `base`, as `Path`.

        Raises:
            ManifoldError: the manifold has no `base`.
        """
        return drawn_like(x, self.manifold.base(x.dtype), generator)

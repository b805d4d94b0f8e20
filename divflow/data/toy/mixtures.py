"""Mixtures on manifolds: of von Mises-Fisher densities on the sphere, and of wrapped normals on the torus and of rotations."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from divflow.errors import check_count, check_generator, check_positive
from divflow.manifolds import SpecialOrthogonal, Sphere, Torus
from divflow.manifolds.symmetric import Symmetric

__all__ = [
    "VonMisesFisherMixture",
    "WrappedNormalMixture",
    "rotations_mixture",
    "sphere_mixture",
    "torus_mixture",
]


class VonMisesFisherMixture:
    """Equal mixture of von Mises-Fisher densities on the sphere of R^3, with respect to its area.

        p(x) = mean over k of C(c) exp(c mu_k . x),    C(c) = c / (4 pi sinh c)

    Args:
        means: unit vectors mu_k, `(k, 3)`.
        concentration: c > 0; the standard deviation of a direction is about 1 / sqrt(c) radians.

    Raises:
        ManifoldError: means off the sphere.
        ValueError: the concentration is not positive.

    Example:
        >>> density = VonMisesFisherMixture(torch.tensor([[0.0, 0.0, 1.0]]), concentration=100.0)
        >>> density.log_prob(torch.tensor([[0.0, 0.0, 1.0]]))
        tensor([2.7673])
    """

    manifold = Sphere(2)

    def __init__(self, means: Tensor, concentration: float) -> None:
        check_positive("concentration", concentration)
        self.means, self.concentration = self.manifold.project(self.manifold.check(means).double()), concentration

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, 3)`, exact: the cosine to the mean by its distribution function, the direction uniform."""
        check_generator(generator)
        c = self.concentration
        mean = self.means[torch.randint(len(self.means), (count,), generator=generator, device="cpu")]
        u = torch.rand(count, 1, generator=generator, dtype=torch.float64, device="cpu")
        # 1 - cosine, from which the sine has all its digits.
        below = -torch.log1p((1 - u) * math.expm1(-2 * c)) / c
        noise = torch.randn(count, 3, generator=generator, dtype=torch.float64, device="cpu")
        tangent = self.manifold.to_tangent(mean, noise)
        tangent = tangent / torch.linalg.vector_norm(tangent, dim=1, keepdim=True)
        return ((1 - below) * mean + (below * (2 - below)).clamp_min(0).sqrt() * tangent).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, 3)` in nats, `(k,)`."""
        c = self.concentration
        points, means = self.manifold.project(self.manifold.check(x).double()), self.means.to(x.device)
        # c (mu . x - 1), without the cancellation; exp(c) is in the normalization, which then does not overflow.
        exponent = -c / 2 * torch.cdist(points, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        log_normalizer = math.log(2 * math.pi * len(means) / c) + math.log(-math.expm1(-2 * c))
        return (torch.logsumexp(exponent, dim=1) - log_normalizer).to(x.dtype)


class WrappedNormalMixture:
    """Equal mixture of wrapped normal densities of a manifold, with respect to its volume.

        p(x) = mean over k of N_wrapped(x; mean_k, std^2)

    Args:
        manifold: such as `Torus(2)` or `SpecialOrthogonal()`.
        means: points `(k, *event)`.
        std: standard deviation in the tangent space, in radians on rotations and in the unit of the period on tori.

    Raises:
        ManifoldError: means off the manifold, or an std that is not positive.

    Example:
        >>> density = WrappedNormalMixture(Torus(2), torch.zeros(1, 2), std=0.1)
        >>> density.log_prob(torch.zeros(1, 2))
        tensor([2.7673])
    """

    def __init__(self, manifold: Symmetric, means: Tensor, std: float) -> None:
        self.manifold, self.std = manifold, std
        self.means = manifold.project(manifold.check(means).double())
        manifold.wrapped_normal(self.means, std)  # which refuses a wrong std

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, *event)`."""
        check_generator(generator)
        mean = self.means[torch.randint(len(self.means), (count,), generator=generator, device="cpu")]
        with _seeded(generator):
            return self.manifold.wrapped_normal(mean, self.std).sample().float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, *event)` in nats, `(k,)`."""
        points = self.manifold.project(self.manifold.check(x).double())
        components = self.manifold.wrapped_normal(self.means.to(x.device), self.std)
        parts = [torch.logsumexp(components.log_prob(part[:, None]), dim=1) for part in points.split(4096)]
        return (torch.cat(parts) - math.log(len(self.means))).to(x.dtype)


def sphere_mixture(components: int = 8, concentration: float = 50.0, seed: int = 0) -> VonMisesFisherMixture:
    """Von Mises-Fisher densities on the sphere, about means that are drawn uniformly.

    Args:
        components: number of densities.
        concentration: of each.
        seed: of the means.
    """
    return VonMisesFisherMixture(_means(Sphere(2), components, seed), concentration)


def torus_mixture(components: int = 8, std: float = 0.3, seed: int = 0) -> WrappedNormalMixture:
    """Wrapped normal densities of two angles, about means that are drawn uniformly.

    Args:
        components: number of densities.
        std: standard deviation of each angle, in radians.
        seed: of the means.
    """
    return WrappedNormalMixture(Torus(2), _means(Torus(2), components, seed), std)


def rotations_mixture(components: int = 16, std: float = 0.07, seed: int = 0) -> WrappedNormalMixture:
    """Wrapped normal densities of rotations, about means that are drawn uniformly.

    Args:
        components: number of densities.
        std: standard deviation along each axis, in radians.
        seed: of the means.
    """
    return WrappedNormalMixture(SpecialOrthogonal(), _means(SpecialOrthogonal(), components, seed), std)


def _means(manifold: Symmetric, components: int, seed: int) -> Tensor:
    check_count("components", components)
    check_count("seed", seed, 0)
    with _seeded(Generator().manual_seed(seed)):
        return manifold.uniform(torch.float64).sample((components,))


@contextmanager
def _seeded(generator: Generator | None) -> Iterator[None]:
    """Draws of torch's default generator are those of another, which draws their seed."""
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

"""Densities in closed form: Gaussians on a ring, a checkerboard, a pinwheel."""

import math

import torch
from torch import Generator, Tensor

from divflow.data.toy.smooth import SmoothDensity

__all__ = ["Checkerboard", "Pinwheel", "RingOfGaussians", "checkerboard", "eight_gaussians", "pinwheel"]


class RingOfGaussians(SmoothDensity):
    """Equal mixture of Gaussians with means on a circle.

    Args:
        count: number of Gaussians.
        radius: radius of the circle.
        noise: standard deviation of each Gaussian.
    """

    def __init__(self, count: int, radius: float, noise: float) -> None:
        if not noise > 0:
            raise ValueError(f"noise must be positive, but is {noise!r}")
        angles = 2 * math.pi * torch.arange(count, dtype=torch.float64, device="cpu") / count
        self._means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.noise = noise

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, 2)`."""
        which = torch.randint(len(self._means), (count,), generator=generator, device="cpu")
        return (self._means[which] + self.noise * torch.randn(count, 2, generator=generator, device="cpu")).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, 2)` in nats, `(k,)`."""
        exponent = -torch.cdist(x.double(), self._means.to(x.device)).square() / (2 * self.noise**2)
        log_normalizer = math.log(2 * math.pi * self.noise**2 * len(self._means))
        return (torch.logsumexp(exponent, dim=1) - log_normalizer).to(x.dtype)


class Checkerboard:
    """Uniform on every second square of a centred checkerboard of 4 x 4 unit squares, -inf outside; its edges have no score."""

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, 2)`."""
        square = torch.randint(8, (count,), generator=generator, device="cpu")
        row = square // 2
        column = 2 * (square % 2) + row % 2
        corner = torch.stack([column, row], dim=1) - 2
        return corner + torch.rand(count, 2, generator=generator, device="cpu")

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, 2)` in nats, `(k,)`: -log 8 on the squares."""
        inside = (x.abs() < 2).all(dim=1) & (x.floor().sum(dim=1) % 2 == 0)
        return torch.where(inside, -math.log(8.0), -math.inf).to(x.dtype)


class Pinwheel(SmoothDensity):
    """Five Gaussian blades, sheared to a pinwheel by a rotation whose angle depends on the distance from the centre.

    In its own frame a blade is normal with mean (1, 0) and standard deviations (radial, tangential). It is then rotated by its own
    angle plus rate * exp(r), r the distance from the centre. Such a rotation preserves areas, so the density is the mixture of the
    blades' own densities.

    Args:
        blades: number of blades.
        radial: standard deviation along a blade.
        tangential: standard deviation across it.
        rate: rate of the shear.
        scale: factor of the points.
    """

    def __init__(
        self, blades: int = 5, radial: float = 0.3, tangential: float = 0.1, rate: float = 0.25, scale: float = 2.0
    ) -> None:
        self.blades, self.radial, self.tangential, self.rate, self.scale = blades, radial, tangential, rate, scale

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, 2)`."""
        points = (
            torch.randn(count, 2, generator=generator, dtype=torch.float64, device="cpu") * self._deviations
            + self._mean
        )
        blade = torch.randint(self.blades, (count,), generator=generator, device="cpu")
        return (self.scale * _rotate(points, self._angles(points)[blade, torch.arange(count, device="cpu")])).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, 2)` in nats, `(k,)`."""
        points = x.double().cpu() / self.scale
        own = torch.stack([_rotate(points, -angle) for angle in self._angles(points)])
        exponent = -((own - self._mean) / self._deviations).square().sum(dim=2) / 2
        log_normalizer = math.log(2 * math.pi * self.radial * self.tangential * self.scale**2 * self.blades)
        return (torch.logsumexp(exponent, dim=0) - log_normalizer).to(x)

    @property
    def _mean(self) -> Tensor:
        return torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")

    @property
    def _deviations(self) -> Tensor:
        return torch.tensor([self.radial, self.tangential], dtype=torch.float64, device="cpu")

    def _angles(self, points: Tensor) -> Tensor:
        """Angle by which each blade would rotate the points, `(blades, k)`."""
        own = 2 * math.pi * torch.arange(self.blades, dtype=torch.float64, device="cpu") / self.blades
        return own[:, None] + self.rate * points.norm(dim=1).exp()


def _rotate(points: Tensor, angle: Tensor) -> Tensor:
    x, y = points.unbind(dim=1)
    return torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], dim=1)


def eight_gaussians(noise: float = 0.2) -> RingOfGaussians:
    """Eight Gaussians on a circle of radius 2.

    Args:
        noise: standard deviation of each.
    """
    return RingOfGaussians(8, 2.0, noise)


def checkerboard() -> Checkerboard:
    """Uniform on every second of 4 x 4 unit squares."""
    return Checkerboard()


def pinwheel() -> Pinwheel:
    """Five blades, sheared."""
    return Pinwheel()

"""Uniform and wrapped normal densities of manifolds, as `torch.distributions`."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from divflow.manifolds.manifold import ManifoldError
from divflow.manifolds.series import arcsine_ratio

__all__ = ["Known", "Uniform", "WrappedNormal", "log_wrapped_radial", "windings"]

# Standard deviations beyond which a normal density is below the rounding of float64.
_REACH = 9.0


class Known(Protocol):
    """A manifold whose uniform and wrapped normal densities are known (`divflow.manifolds.symmetric`)."""

    event_shape: Size

    @property
    def volume(self) -> float:
        """Of the whole manifold."""

    def check(self, x: Tensor) -> Tensor:
        """Refuse points off it."""

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """Along a geodesic."""

    def draw_uniform(self, shape: Size, like: Tensor) -> Tensor:
        """Uniform points."""

    def draw_tangent(self, x: Tensor) -> Tensor:
        """Standard normal tangent vectors."""

    def log_wrapped_normal(self, mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
        """The log-density."""


class Uniform(Distribution):
    """The uniform density of a manifold of finite volume.

        p(x) = 1 / volume.

    Args:
        manifold: such as `Sphere(2)`; its method `uniform` makes this.
        dtype: of samples; torch's default dtype if None.

    Raises:
        ManifoldError: by `log_prob`, points off the manifold.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(self, manifold: Known, dtype: torch.dtype | None = None) -> None:
        self.manifold = manifold
        self.like = torch.zeros((), dtype=dtype or torch.get_default_dtype())  # by which samples have dtype and device
        super().__init__(Size(), manifold.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The ambient space, of which `log_prob` refuses all but the manifold."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Points `(*sample_shape, *event_shape)`."""
        return self.manifold.draw_uniform(Size(sample_shape), self.like)

    def log_prob(self, value: Tensor) -> Tensor:
        """-log volume in nats, `(*sample,)`."""
        batch = self.manifold.check(value).shape[: value.ndim - len(self.event_shape)]
        return value.new_full(batch, -math.log(self.manifold.volume))


class WrappedNormal(Distribution):
    """The density of exp(mean, v) with respect to a manifold's volume, where v ~ N(0, std^2) in the tangent space at the mean.

    Every geodesic that leads from the mean to a point counts, however often it winds; a manifold's `wrapped_normal` makes this, and its
    docstring has the formula.

    Args:
        manifold: such as `Sphere(2)`.
        mean: `(*batch, *event_shape)`.
        std: positive, a number or `(*batch,)`; radians on spheres and rotations, the unit of the period on tori.

    Raises:
        ManifoldError: a mean off the manifold, or an std that is not positive; by `log_prob`, points off the manifold.

    Example:
        >>> from divflow.manifolds import Sphere
        >>> WrappedNormal(Sphere(2), torch.tensor([0.0, 0.0, 1.0]), 0.1).log_prob(torch.tensor([0.0, 0.0, 1.0]))
        tensor(2.7673)
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(self, manifold: Known, mean: Tensor, std: Tensor | float) -> None:
        self.manifold, self.loc = manifold, manifold.check(mean)
        batch = mean.shape[: mean.ndim - len(manifold.event_shape)]
        self.scale = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
        if not bool((self.scale > 0).all()) or not bool(self.scale.isfinite().all()):
            raise ManifoldError(
                f"std must be positive and finite, but is {std}; give a number, or one for each of the means {tuple(batch)}"
            )
        try:
            self.scale = self.scale.expand(batch)
        except RuntimeError:
            raise ManifoldError(
                f"std must be a number or one for each of the means {tuple(batch)}, but has shape {tuple(self.scale.shape)}"
            ) from None
        super().__init__(batch, manifold.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The ambient space, of which `log_prob` refuses all but the manifold."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: "WrappedNormal | None" = None) -> "WrappedNormal":
        """The same, its mean and std repeated to a batch shape."""
        shape = Size(batch_shape)
        return WrappedNormal(self.manifold, self.loc.expand(shape + self.event_shape), self.scale.expand(shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Points `(*sample_shape, *batch, *event_shape)`, differentiable in mean and std."""
        mean = self.loc.expand(self._extended_shape(Size(sample_shape)))
        std = self.scale[(..., *[None] * len(self.event_shape))]
        return self.manifold.exp(mean, std * self.manifold.draw_tangent(mean))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density in nats, `(*sample, *batch)`."""
        return self.manifold.log_wrapped_normal(self.loc, self.scale, self.manifold.check(value))


def windings(std: Tensor, like: Tensor) -> Tensor:
    """Whole numbers of turns -K to K, beyond which a normal of these standard deviations in radians has no density left."""
    most = math.ceil(_REACH * std.detach().max().item() / (2 * math.pi)) + 1
    return torch.arange(-most, most + 1, dtype=like.dtype, device=like.device)


def log_wrapped_radial(squared_sine: Tensor, cosine: Tensor, std: Tensor, dim: int, radius: float) -> Tensor:
    """The log of a wrapped normal density on a sphere, or on one whose opposite points are the same.

        log p = log sum_k |r_k / s|^(d-1) N(r_k; 0, std^2)

    The geodesics through the mean are closed after 2 pi, r_k = r + 2 pi k at a distance r, and s = radius sin(r / radius) is what the
    exponential map makes of r in the other d - 1 directions. Where s vanishes and the density is infinite, it is the one at a distance
    of the dtype's precision.

    Args:
        squared_sine: of r / radius, `(*batch,)`.
        cosine: of r / radius.
        std: of the normal density, `(*batch,)`.
        dim: d.
        radius: of the sphere.
    """
    eps = torch.finfo(squared_sine.dtype).eps
    apart = squared_sine.clamp(min=eps**2)
    squared_sine = torch.where(cosine > 0, squared_sine, apart)
    ratio = arcsine_ratio(squared_sine, cosine)
    # The shortest geodesic alone is smooth at the mean, as a function of the squared distance.
    shortest = -(radius**2) * ratio.square() * squared_sine / (2 * std**2) + (dim - 1) * ratio.log()
    turns = windings(std, std)
    others = radius * ratio * apart.sqrt()
    lengths = others[..., None] + 2 * math.pi * turns[turns != 0]
    log_sine = math.log(radius) + apart.log() / 2
    wound = -lengths.square() / (2 * std[..., None] ** 2) + (dim - 1) * (lengths.abs().log() - log_sine[..., None])
    terms = torch.cat([shortest[..., None], wound.expand(*shortest.shape, -1)], dim=-1)
    return torch.logsumexp(terms, dim=-1) - dim * (std.log() + math.log(2 * math.pi) / 2)

"""The standard normal of particles without centre of mass: a base that torch lacks."""

import math
from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from divflow.distributions.base import BaseError
from divflow.divergence.check import fresh_copy
from divflow.errors import checked_event_shape, listed_rows
from divflow.operators.differentiating import evaluated
from divflow.operators.field import Field, as_time

__all__ = ["MeanFreeNormal"]


class MeanFreeNormal(Distribution):
    """The standard normal on particles whose centre of mass is zero (Köhler, Klein & Noé 2020, arXiv:2006.02425).

        log p(z) = -|z|^2 / 2 - (n - 1) d / 2 log(2 pi),        sum_i z_i = 0

    This is a density on the subspace of (n - 1) d dimensions, in its own Euclidean volume, and so are the densities of its
    flows. Their velocity v must not move the centre: use `PairField`, `EGNN(mean_free=True)`, or subtract the mean over
    particles from any other. Then the divergence of v over all n d dimensions is that on the subspace: with P the
    projection to it, J the Jacobian of v and P J = J, tr(P J P) = tr(P J) = tr J. States off the subspace, of data or of a
    velocity that moves the centre, are refused.

    Args:
        event_shape: `(particles, dimensions)`.
        validate_args: whether states off the subspace are refused. True here, whatever the default of torch's
            distributions, which other libraries change.

    Raises:
        BaseError: an event shape that is not (particles, dimensions) with at least two particles; in `log_prob`, a centre
            that is not zero.

    Example:
        >>> MeanFreeNormal((2, 1)).log_prob(torch.tensor([[0.5], [-0.5]]))
        tensor(-1.1689)
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    mean_free = True

    def __init__(self, event_shape: Sequence[int], validate_args: bool = True) -> None:
        shape = checked_event_shape(event_shape)
        if len(shape) != 2 or shape[0] < 2:
            raise BaseError(f"event_shape must be (particles, dimensions) with at least two particles, but is {shape}")
        self.center = torch.zeros(shape[1])  # a flow's samples take its dtype and device
        super().__init__(Size(), Size(shape), validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log-density in nats, `(*sample,)`.

        Args:
            value: states `(*sample, particles, dimensions)`.
        """
        if self._validate_args:
            self._validate_sample(value)
        self.check_states(value)
        particles, dimensions = self.event_shape
        return -value.square().sum(dim=(-2, -1)) / 2 - (particles - 1) * dimensions / 2 * math.log(2 * math.pi)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw normal samples `(*sample_shape, particles, dimensions)` and subtract their mean over particles."""
        shape = Size(sample_shape) + self.event_shape
        noise = torch.randn(shape, dtype=self.center.dtype, device=self.center.device)
        return noise - noise.mean(dim=-2, keepdim=True)

    @torch.no_grad()
    def check_velocity(self, velocity: Field, t: float, x: Tensor) -> None:
        """Refuse a velocity that moves the centre of mass; call it once before training.

        A module is examined on a copy whose all-zero parameters are perturbed, as by `check_field`.

        Args:
            velocity: the field v(t, x).
            t: the time at which it is tested.
            x: states `(k, particles, dimensions)`.

        Raises:
            BaseError: the centre moves.
        """
        field, _ = fresh_copy(velocity)
        v = evaluated(field, as_time(t, x), x.clone())
        moved, largest = v.mean(dim=-2).abs().amax(dim=-1), v.abs().amax(dim=(-2, -1))
        eps = torch.finfo(v.dtype).eps
        # Each row relative to its own size; if that nearly vanishes, the rest of larger numbers is rounding.
        excess = moved - (eps**0.5 * largest + 10 * eps * largest.amax())
        if (excess > 0).any():
            row = int(excess.argmax())
            raise BaseError(
                f"MeanFreeNormal needs particles whose centre of mass stays at zero, but the velocity moves it by {moved[row].item():.3g} "
                f"per unit of time (its largest entry is {largest[row].item():.3g}). Set mean_free=True of HollowEGNN or EGNN "
                "(network.mean_free=true), use PairField, or subtract the mean over particles from the velocity."
            )

    def check_states(self, value: Tensor) -> None:
        """Refuse states off the subspace, of the base or of a flow's data, if `validate_args`.

        Args:
            value: states `(*sample, particles, dimensions)`.

        Raises:
            BaseError: a centre of mass that is not zero.
        """
        if not self._validate_args or value.numel() == 0:
            return
        value = value.detach()
        centers = value.mean(dim=-2).abs().amax(dim=-1)
        off = centers > torch.finfo(value.dtype).eps ** 0.5 * (1 + value.abs().amax(dim=(-2, -1)))
        if off.any():
            raise BaseError(
                f"MeanFreeNormal needs particles whose centre of mass is zero, but one lies {centers[off].max().item():.3g} off "
                f"({listed_rows(off.flatten())}). Subtract the mean over particles from the data and from the velocity, and scale all "
                "entries of the data alike."
            )

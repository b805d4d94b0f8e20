"""Boltzmann density of four particles in the plane by quadrature: log Z and the distribution of a pair's distance."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from divflow.energies.pairs import EnergyError, PairEnergy, check_energy
from divflow.errors import check_count, check_positive

__all__ = ["Quartet", "quartet"]

# Largest change between two grids, in nats and in probability.
_TOLERANCE = 1e-4
# Each grid is finer than the one before by a half, and pairs may be farther apart: where exp(-u) is above exp(-depth) of its maximum.
_SHARES = (8 / 27, 4 / 9, 2 / 3, 1)
_DEPTHS = (30.0, 36.0, 43.0, 52.0)


class Quartet(NamedTuple):
    """Results of the quadrature for four particles in the plane.

    Attributes:
        log_normalizer: log Z over states whose centre of mass is zero, in nats.
        beyond: P(r > split), r being the distance of any pair.
        distances: nodes r, ascending, `(nodes,)`, in float64.
        density: p(r) at the nodes, `(nodes,)`.
        weights: weights of the nodes, such that the mean of h(r) is the sum of weights * density * h(distances).
    """

    log_normalizer: float
    beyond: float
    distances: Tensor
    density: Tensor
    weights: Tensor


def quartet(energy: PairEnergy, split: float, points: int = 432) -> Quartet:
    """Compute log Z and p(r), refining and widening a grid until neither log Z nor P(r > split) changes by 1e-4.

    At a fixed distance r of particles 1 and 2, with w(y) = exp(-u(|y - x_1|) - u(|y - x_2|)) for the two others,

        4 Z p(r) = 2 pi r exp(-u(r)) integral of w(y) w(z) exp(-u(|y - z|)) dy dz

    where 4 = n^(d/2) converts the volume of coordinates relative to particle 1 to that of the subspace. The convolution is an FFT on a
    periodic grid; its trapezoidal rule is as accurate as the functions are smooth. Over r the rule is Gauss-Legendre, below and beyond
    `split`. Pairs that may meet, or wells that four particles in the plane can't all occupy, make the integral hard.

    Args:
        energy: energy of 4 particles in 2 dimensions.
        split: a distance, such as that between two wells.
        points: points of the finest grid in each direction. The cost, a few seconds, grows with their cube.

    Raises:
        EnergyError: the energy is of other particles or does not bind them, no pair reaches the split, or the finest grid does not
            resolve the density.
    """
    check_energy(energy)
    check_positive("split", split)
    check_count("points", points, least=100)
    if energy.event_shape != (4, 2):
        raise EnergyError(
            f"this quadrature is for 4 particles in 2 dimensions, but the energy takes events of shape {energy.event_shape}"
        )
    coarse: Quartet | None = None
    for share, depth in zip(_SHARES, _DEPTHS, strict=True):
        fine = _on_grid(energy, split, round(share * points), depth)
        if coarse is not None:
            changes = abs(fine.log_normalizer - coarse.log_normalizer), abs(fine.beyond - coarse.beyond)
            if all(change < _TOLERANCE for change in changes):  # NaN is not
                return fine
        coarse = fine
    raise EnergyError(
        f"quadrature does not resolve {energy}: between its last two grids, the finer with {points} points in each direction, log Z "
        f"changes by {changes[0]:.1g} and P(r > {split}) by {changes[1]:.1g}. Take more points, or Tempering's log Z"
    )


def _on_grid(energy: PairEnergy, split: float, points: int, depth: float) -> Quartet:
    least, reach = _range(energy, depth)
    if split >= reach:
        raise EnergyError(
            f"split must be a distance that pairs of {energy} can have, below {reach:.3g}, but is {split}"
        )

    def boltzmann(squared: Tensor) -> Tensor:
        return (least - energy.pair(squared)).exp()

    # Particles 3 and 4 are within a reach of the middle of 1 and 2, and so at most two from each other: of a period of three, no image
    # of them is within a reach.
    spacing = 3 * reach / points
    axis = (torch.arange(points, dtype=torch.float64, device="cpu") - points // 2) * spacing
    along, across = torch.meshgrid(axis, axis, indexing="ij")
    between = torch.fft.rfft2(torch.fft.ifftshift(boltzmann(along.square() + across.square())))
    nodes = points // 3
    x, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))
    ends = ((0.0, split), (split, reach))
    r = torch.cat([low + (high - low) * (x + 1) / 2 for low, high in ends])
    weights = torch.cat([(high - low) / 2 * weights for low, high in ends])
    inner = []
    for distance in r:
        first, second = (boltzmann((along + side * distance / 2).square() + across.square()) for side in (1, -1))
        w = first * second
        inner.append((w * torch.fft.irfft2(torch.fft.rfft2(w) * between, s=w.shape)).sum() * spacing**4)
    density = 2 * math.pi * r * boltzmann(r.square()) * torch.stack(inner)
    total = (weights * density).sum()
    beyond = (weights * density)[nodes:].sum() / total
    log_normalizer = float(total.log()) - math.log(4) - 6 * least
    return Quartet(log_normalizer, float(beyond), r, density / total, weights)


def _range(energy: PairEnergy, depth: float) -> tuple[float, float]:
    """The least u, and the largest distance at which u is less than `depth` above it."""
    r = torch.logspace(-9, 9, 100_001, dtype=torch.float64, device="cpu")
    u = energy.pair(r.square())
    least = float(u.min())
    if not math.isfinite(least):
        raise EnergyError(
            f"the pair energy of {energy} must be finite or +inf at all distances, but one of its values is {least}"
        )
    near = r[u - least < depth].max()
    if near == r[-1]:
        raise EnergyError(f"{energy} does not bind its particles, so it has no density. Let u grow with the distance")
    return least, float(near)

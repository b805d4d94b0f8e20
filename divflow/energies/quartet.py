"""The Boltzmann density of four particles in the plane by quadrature: log Z and the distribution of a pair's distance."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from divflow.energies.pairs import EnergyError, PairEnergy

__all__ = ["Quartet", "quartet"]


class Quartet(NamedTuple):
    """What quadrature says of four particles in the plane.

    Attributes:
        log_normalizer: log Z over states whose centre of mass is zero, in nats.
        beyond: P(r > split), of the distance r of any pair.
        distances: nodes r, ascending, `(nodes,)`, in float64.
        density: p(r) at the nodes, `(nodes,)`.
        weights: of the nodes, so that the mean of h(r) is the sum of weights * density * h(distances).
    """

    log_normalizer: float
    beyond: float
    distances: Tensor
    density: Tensor
    weights: Tensor


def quartet(energy: PairEnergy, split: float, half_width: float = 12.0, points: int = 192, nodes: int = 64) -> Quartet:
    """Log Z and p(r), to all digits where the grid is fine and wide enough: see that another gives the same.

    At a fixed distance r of particles 1 and 2 the others see these and each other: with w(y) = exp(-u(|y - x_1|) - u(|y - x_2|)),

        4 Z p(r) = 2 pi r exp(-u(r)) integral of w(y) w(z) exp(-u(|y - z|)) dy dz

    where 4 = n^(d/2) is the volume of the coordinates relative to particle 1, in that of the subspace. The convolution is taken by FFT on a
    periodic grid, and the trapezoidal rule is as good as the functions are smooth and vanish at its ends; over r it is Gauss and
    Legendre's rule, below and beyond a split.

    Args:
        energy: of 4 particles in 2 dimensions.
        split: a distance, such as that between two wells.
        half_width: of the grid, and the largest distance; exp(-u) must be negligible there.
        points: of the grid, in each direction.
        nodes: distances on each side of the split.

    Raises:
        EnergyError: an energy of other particles.
    """
    if energy.event_shape != (4, 2):
        raise EnergyError(
            f"this quadrature is for 4 particles in 2 dimensions, but the energy is one of {energy.event_shape}"
        )
    axis = torch.arange(points, dtype=torch.float64) * (2 * half_width / points) - half_width
    along, across = torch.meshgrid(axis, axis, indexing="ij")
    cell = (2 * half_width / points) ** 2
    between = torch.fft.rfft2(torch.fft.ifftshift(_boltzmann(energy, along.square() + across.square())))
    x, weights = map(torch.as_tensor, np.polynomial.legendre.leggauss(nodes))
    ends = ((0.0, split), (split, half_width))
    r = torch.cat([low + (high - low) * (x + 1) / 2 for low, high in ends])
    weights = torch.cat([(high - low) / 2 * weights for low, high in ends])
    inner = []
    for distance in r:
        first, second = (
            _boltzmann(energy, (along + side * distance / 2).square() + across.square()) for side in (1, -1)
        )
        w = first * second
        inner.append((w * torch.fft.irfft2(torch.fft.rfft2(w) * between, s=w.shape)).sum() * cell**2)
    density = 2 * math.pi * r * _boltzmann(energy, r.square()) * torch.stack(inner)
    total = (weights * density).sum()
    beyond = (weights * density)[nodes:].sum() / total
    return Quartet(float(total.log()) - math.log(4), float(beyond), r, density / total, weights)


def _boltzmann(energy: PairEnergy, squared: Tensor) -> Tensor:
    return (-energy.pair(squared)).exp()

"""Quadrature of four particles in the plane against a normal density, and against itself on other grids."""

import math

import pytest
import torch
from springs import Springs

from divflow.energies import DoubleWell, EnergyError, quartet


def test_a_normal_density():
    """Differences of two particles are normal, of variance 2 / stiffness: their length is Rayleigh's."""
    energy = Springs(stiffness=2.0)
    found = quartet(energy, split=1.0)
    assert abs(found.log_normalizer - energy.log_normalizer) < 1e-9
    assert abs(found.beyond - math.exp(-0.5)) < 1e-9
    r = found.distances
    torch.testing.assert_close(found.density, r * (-r.square() / 2).exp())


def test_no_digit_depends_on_the_grid():
    one, other = quartet(DoubleWell(), 4.0), quartet(DoubleWell(), 4.0, half_width=14.0, points=288, nodes=90)
    assert abs(one.log_normalizer - other.log_normalizer) < 1e-7
    assert abs(one.beyond - other.beyond) < 1e-7


def test_others_are_refused():
    with pytest.raises(EnergyError, match=r"4 particles in 2 dimensions.*\(3, 2\)"):
        quartet(DoubleWell(3), 4.0)

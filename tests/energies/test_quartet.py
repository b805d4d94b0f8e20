"""Quadrature of four particles in the plane against a normal density, and against itself on other grids."""

import math
from dataclasses import dataclass

import pytest
import torch
from springs import Springs

from divflow.energies import DoubleWell, EnergyError, LennardJones, PairEnergy, quartet


@pytest.mark.parametrize("stiffness", [2.0, 1e-6, 1e6])
def test_a_normal_density(stiffness):
    """Differences of two particles are normal, of variance 2 / stiffness: their length is Rayleigh's."""
    energy, unit = Springs(stiffness=stiffness), math.sqrt(2 / stiffness)
    found = quartet(energy, split=unit)
    assert abs(found.log_normalizer - energy.log_normalizer) < 1e-9
    assert abs(found.beyond - math.exp(-0.5)) < 1e-9
    r = found.distances / unit
    torch.testing.assert_close(found.density * unit, r * (-r.square() / 2).exp())


def test_the_double_well_of_the_literature():
    found = quartet(DoubleWell(), 4.0)
    assert abs(found.log_normalizer - 29.66723223) < 1e-7
    assert abs(found.beyond - 0.50533453) < 1e-7


@pytest.mark.parametrize(
    ("energy", "log_normalizer", "beyond"),
    [(DoubleWell(d0=7.0), 28.78421, 0.46899), (DoubleWell(d0=8.0), 28.25506, 0.33928)],
    ids=["7", "8"],
)
def test_wide_wells(energy, log_normalizer, beyond):
    """Tempering says 28.231 ± 0.045 and 0.339 at d_0 = 8; where the grid wrapped around, it was 30.06 and 0.229."""
    found = quartet(energy, energy.d0)
    assert abs(found.log_normalizer - log_normalizer) < 1e-4
    assert abs(found.beyond - beyond) < 1e-4


def test_a_cold_well_takes_a_finer_grid():
    """On 128 points log Z is 128.0137; on the next two, 128.0136528."""
    found = quartet(DoubleWell(tau=0.2), 4.0)
    assert len(found.distances) == 2 * 288 // 3
    assert abs(found.log_normalizer - 128.0136528) < 1e-6


@dataclass(frozen=True)
class Of(PairEnergy):
    """A constant, whatever the distance."""

    particles: int = 4
    dimensions: int = 2
    constant: float = 0.0

    def pair(self, squared):
        return torch.full_like(squared, self.constant)


@pytest.mark.parametrize(
    ("energy", "split", "message"),
    [
        (DoubleWell(3), 4.0, r"4 particles in 2 dimensions.*\(3, 2\)"),
        (DoubleWell(d0=14.0), 14.0, "not resolve.*d0=14.0.*more points"),
        (DoubleWell(tau=0.01), 4.0, "not resolve.*tau=0.01"),
        (DoubleWell(c=0.1), 4.0, "not resolve"),
        (LennardJones(4, 2), 1.5, "not resolve"),
        (DoubleWell(), 100.0, "split.*below.*100"),
        (Of(), 1.0, "not bind its particles"),
        (Of(constant=math.nan), 1.0, "finite.*nan"),
        (lambda x: x, 4.0, "must be a PairEnergy.*function"),
    ],
    ids=["three", "d0=14", "cold", "meeting", "lj4", "split", "free", "nan", "function"],
)
def test_what_is_refused(energy, split, message):
    with pytest.raises(EnergyError, match=message):
        quartet(energy, split, points=150)

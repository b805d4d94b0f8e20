"""Energies of particles against their formulas in loops, their symmetries, and a minimum that is known."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import minimize_scalar

from divflow.energies import DoubleWell, EnergyError, LennardJones, PairEnergy

ENERGIES = {
    "dw4": DoubleWell(),
    "dw of three in space": DoubleWell(3, 3, a=0.3, tau=2.0),
    "lj13": LennardJones(),
    "lj of five in the plane": LennardJones(5, 2, epsilon=0.7, r_m=1.3, oscillator=0.4),
}


def states(particles, dimensions, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, particles, dimensions, generator=generator, dtype=torch.float64)


def by_hand(energy, x):
    """One sample, pair by pair and particle by particle."""
    total = 0.0
    for i, j in itertools.combinations(range(len(x)), 2):
        r = math.dist(x[i], x[j])
        if isinstance(energy, DoubleWell):
            d = r - energy.d0
            total += (energy.a * d + energy.b * d**2 + energy.c * d**4) / energy.tau
        else:
            total += energy.epsilon * ((energy.r_m / r) ** 12 - 2 * (energy.r_m / r) ** 6)
    if isinstance(energy, LennardJones):
        centre = [sum(column) / len(x) for column in zip(*x, strict=True)]
        total += energy.oscillator / 2 * sum(math.dist(point, centre) ** 2 for point in x)
    return total


@pytest.mark.parametrize("name", ENERGIES)
def test_formulas(name):
    energy = ENERGIES[name]
    x = states(*energy.event_shape) + 0.7
    expected = torch.tensor([by_hand(energy, sample) for sample in x.tolist()], dtype=x.dtype)
    torch.testing.assert_close(energy(x), expected)
    pairs = itertools.combinations(range(energy.particles), 2)
    distances = torch.stack([(x[:, i] - x[:, j]).norm(dim=1) for i, j in pairs], dim=1)
    torch.testing.assert_close(energy.distances(x), distances)


def test_the_parameters_are_those_of_the_literature():
    """Wells of a pair at 4 -+ sqrt(4 / 1.8), 4.44 kT deep; and two particles at r_m are bound by epsilon = 2."""
    well = torch.tensor([[[0.0, 0.0], [4 - math.sqrt(4 / 1.8), 0.0]]])
    pair = DoubleWell(2)
    torch.testing.assert_close(pair(well), torch.tensor([-(4.0**2) / (4 * 0.9)]))
    assert pair(torch.tensor([[[0.0, 0.0], [4.0, 0.0]]])) == 0
    bound = LennardJones(2, oscillator=1e-9)(torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
    torch.testing.assert_close(bound, torch.tensor([-2.0]))


def test_the_icosahedron_is_as_deep_as_it_is_known_to_be():
    """The global minimum of 13 Lennard-Jones particles is -44.326801 epsilon (Hoare & Pal 1971; Cambridge Cluster Database)."""
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    corners += [(a, b, 0.0) for _, a, b in corners] + [(b, 0.0, a) for _, a, b in corners]
    cluster = torch.tensor([(0.0, 0.0, 0.0), *corners], dtype=torch.float64)[None]
    energy = LennardJones(epsilon=1.0, oscillator=1e-12)
    found = minimize_scalar(lambda scale: energy(scale * cluster).item(), bounds=(0.3, 1.0))
    assert abs(found.fun + 44.326801) < 1e-5


@pytest.mark.parametrize("name", ENERGIES)
def test_symmetries(name):
    energy = ENERGIES[name]
    x = states(*energy.event_shape)
    rotation = torch.linalg.qr(torch.randn(energy.dimensions, energy.dimensions, dtype=x.dtype)).Q
    order = torch.randperm(energy.particles)
    for other in (x @ rotation, x[:, order], x + torch.randn(1, 1, energy.dimensions, dtype=x.dtype)):
        torch.testing.assert_close(energy(other), energy(x))


@pytest.mark.parametrize("name", ENERGIES)
def test_derivatives(name):
    energy = ENERGIES[name]
    x = (3 * states(*energy.event_shape)[:1]).requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,))
    assert torch.autograd.gradgradcheck(energy, (x,))


def test_particles_that_meet():
    x = torch.zeros(1, 4, 2, requires_grad=True)
    u = DoubleWell()(x)
    u.sum().backward()
    torch.testing.assert_close(u.detach(), torch.tensor([6 * (0.9 * 4**4 - 4 * 4**2)]))
    assert x.grad.isfinite().all()
    assert LennardJones()(torch.zeros(1, 13, 3)) == math.inf


def test_the_outer_well():
    x = torch.tensor([[[0.0, 0.0], [5.0, 0.0], [1.0, 0.0], [0.5, 0.0]]])
    energy = DoubleWell()
    torch.testing.assert_close(
        energy.extended(x), torch.tensor([2 / 6])
    )  # 0 and 5, 5 and 0.5: 5 - 1 is no more than d_0
    torch.testing.assert_close(energy.free_energy_difference(torch.tensor(0.8)), torch.tensor(-math.log(4)))


def test_what_is_refused():
    with pytest.raises(EnergyError, match=r"4 particles in 2 dimensions.*\(3, 5, 2\).*DoubleWell"):
        DoubleWell()(torch.randn(3, 5, 2))
    with pytest.raises(ValueError, match=r"particles.*2.*1"):
        DoubleWell(1)
    with pytest.raises(ValueError, match=r"oscillator.*positive.*0"):
        LennardJones(oscillator=0.0)
    with pytest.raises(ValueError, match=r"c must be.*-1"):
        DoubleWell(c=-1.0)
    with pytest.raises(EnergyError, match=r"floating.*int64.*x\.float\(\)"):
        DoubleWell()(torch.ones(3, 4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    "option", [{"a": math.nan}, {"b": math.inf}, {"a": True}, {"b": "4"}, {"c": math.nan}], ids=str
)
def test_parameters_are_finite_numbers(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} must be .*finite number.*{value!r}"):
        DoubleWell(**option)


@dataclass(frozen=True)
class Of(PairEnergy):
    """What `pair` returns, whatever the distance."""

    particles: int = 3
    dimensions: int = 2
    returned: object = None

    def pair(self, squared):
        return self.returned


@pytest.mark.parametrize(
    ("returned", "message"),
    [(torch.tensor(1.0), r"shape \(\)"), (torch.ones(5), r"shape \(5,\)"), (1.5, "1.5")],
    ids=str,
)
def test_a_pair_energy_is_one_of_each_pair(returned, message):
    with pytest.raises(EnergyError, match=rf"pair of Of.*each squared distance, \(5, 3\), but returned {message}"):
        Of(returned=returned)(torch.randn(5, 3, 2))

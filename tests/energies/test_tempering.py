"""Parallel tempering against densities that are known: a normal one, and four particles in the plane by quadrature."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hydra.utils import instantiate
from run import config
from scipy.stats import chi2, kstest
from springs import Springs
from torch import Generator

from divflow.energies import DoubleWell, EnergyError, LennardJones, Tempering, quartet
from divflow.energies.bennett import log_ratios

SHORT = {"chains": 100, "warm_up": 60, "thin": 3}
DW4 = Tempering(rungs=8, power=2.0, std=2.0, chains=200, warm_up=150, thin=8)


def seed(number=0):
    return Generator().manual_seed(number)


@pytest.mark.parametrize("energy", [Springs(), Springs(5, 3, 9.0), Springs(2, 1, 0.5)], ids=str)
def test_a_normal_density(energy):
    found = Tempering(rungs=4, power=2.0, std=1.5, **SHORT)(energy, 4_000, seed())
    x = found.samples
    assert x.shape == (4_000, *energy.event_shape)
    assert x.mean(dim=1).abs().max() < 1e-6
    # Samples of a chain are not independent: every fourth of them.
    squares = energy.stiffness * x[::4].double().square().sum(dim=(1, 2))
    assert kstest(squares, chi2(energy.freedom).cdf).pvalue > 1e-3
    variance = (1 - 1 / energy.particles) / energy.stiffness
    torch.testing.assert_close(x.square().mean(dim=0), torch.full(energy.event_shape, variance), rtol=0.15, atol=0)
    assert 0 < found.standard_error < 0.1
    assert abs(found.log_normalizer - energy.log_normalizer) < 5 * found.standard_error
    assert 0.4 < found.acceptance < 0.95


@pytest.mark.parametrize(
    ("energy", "tempering", "split"),
    [
        (DoubleWell(), DW4, 4.0),
        pytest.param(
            LennardJones(4, 2, r_m=2.0, oscillator=4.0),
            Tempering(rungs=8, power=6.0, std=2.0, chains=200, warm_up=150, thin=8),
            3.0,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dw4", "lj4"],
)
def test_four_in_the_plane(energy, tempering, split):
    found, known = tempering(energy, 8_000, seed()), quartet(energy, split)
    assert abs(found.log_normalizer - known.log_normalizer) < 5 * found.standard_error
    assert found.standard_error < 0.06
    chains = (energy.distances(found.samples) > split).double().mean(dim=1).view(tempering.chains, -1).mean(dim=1)
    error = chains.std() / math.sqrt(tempering.chains)
    assert abs(chains.mean() - known.beyond) < 5 * error
    # And the mean of the distance.
    chains = energy.distances(found.samples).double().mean(dim=1).view(tempering.chains, -1).mean(dim=1)
    mean = (known.weights * known.density * known.distances).sum()
    assert abs(chains.mean() - mean) < 5 * chains.std() / math.sqrt(200)


@pytest.mark.slow
def test_a_run_twice_as_long_finds_the_same():
    short, long = DW4(DoubleWell(), 3_000, seed()), DW4(DoubleWell(), 6_000, seed(1))
    for quantity in (DoubleWell(), lambda x: DoubleWell().distances(x)[:, 0]):
        # Every eighth, which depend on each other little.
        a, b = (quantity(run.samples)[::8].double() for run in (short, long))
        assert kstest(a, b).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dw4", "lj13"])
def test_histograms_of_the_configured_data_are_those_of_a_run_twice_as_long(name):
    """Energies and distances of pairs: shares of a chain in each of ten bins, which are independent between chains."""
    data = config(f"data={name}", "task=flow_matching").data
    energy, sampler = instantiate(data.energy), instantiate(data.sampler)
    longer = dataclasses.replace(sampler, warm_up=2 * sampler.warm_up)
    short, long = sampler(energy, 10_000, seed()).samples, longer(energy, 20_000, seed(1)).samples
    for quantity in (energy, energy.distances):
        found, expected = (quantity(x).double().view(sampler.chains, -1) for x in (short, long))
        edges = expected.flatten()[:: max(1, expected.numel() // 100_000)].quantile(
            torch.linspace(0.1, 0.9, 9).double()
        )
        shares = [
            torch.nn.functional.one_hot(torch.bucketize(values, edges), 10).double().mean(dim=1)
            for values in (found, expected)
        ]
        difference = shares[0].mean(dim=0) - shares[1].mean(dim=0)
        error = ((shares[0].var(dim=0) + shares[1].var(dim=0)) / sampler.chains).sqrt()
        assert (difference / error).abs().max() < 4


def test_seeds():
    sampler = Tempering(rungs=2, **SHORT)
    before = torch.get_rng_state()
    a, b, c = (sampler(Springs(), 150, seed(number)).samples for number in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_are_the_same_whatever_the_default_dtype():
    sampler = Tempering(rungs=2, **SHORT)
    single = sampler(Springs(), 150, seed())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = sampler(Springs(), 150, seed())
    finally:
        torch.set_default_dtype(before)
    assert found.samples.dtype == torch.float32
    assert torch.equal(found.samples, single.samples)


@dataclass(frozen=True)
class Near(Springs):
    """Springs of two on a line, and another energy where they are nearer than 1/2."""

    particles: int = 2
    dimensions: int = 1
    near: float = math.inf

    def pair(self, squared):
        return torch.where(squared < 0.25, self.near, super().pair(squared))


def test_where_the_energy_is_infinite_the_density_vanishes():
    """The difference is normal, of variance 2 / stiffness = 1/2: |d| > 1/2 has probability erfc(1/2)."""
    found = Tempering(rungs=4, power=2.0, std=1.5, **SHORT)(Near(), 4_000, seed())
    assert Near().distances(found.samples).min() >= 0.5
    expected = Near().log_normalizer + math.log(math.erfc(0.5))
    assert abs(found.log_normalizer - expected) < 5 * found.standard_error


@dataclass(frozen=True)
class Of(Springs):
    """Springs times what makes them no energy that can be sampled."""

    factor: float = 1.0
    detached: bool = False

    def pair(self, squared):
        u = self.factor * super().pair(squared)
        return u.detach() if self.detached else u


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (Near(near=math.nan), r"Near.*is NaN, so not finite, at \d+\.\d%.*\+inf where"),
        (Of(factor=math.nan), "is NaN, so not finite, at 100.0%"),
        (Of(factor=math.inf), "the energy of 100.0% of the samples.*not finite"),
        (Of(detached=True), "has no gradient.*detach"),
        (lambda x: x, "must be a PairEnergy.*function.*pair"),
    ],
    ids=["nan near", "nan", "inf", "detached", "function"],
)
def test_energies_that_are_refused(energy, message):
    with pytest.raises(EnergyError, match=message):
        Tempering(rungs=2, **SHORT)(energy, 100, seed())


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(EnergyError, match=r"exchanges only 0\.\d%.*more rungs"):
        Tempering(rungs=1, **SHORT)(Springs(stiffness=4_000.0), 200, seed())


@pytest.mark.parametrize(
    ("option", "message"),
    [({"rungs": 0}, "rungs"), ({"chains": 3}, "chains.*20.*3"), ({"std": 0.0}, "std"), ({"power": "2"}, "power.*'2'")],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        Tempering(**option)


def test_bennetts_ratio_of_normals_one_of_which_is_far():
    """W(x) = x^2 / 2 and beta_k = 1, 3, 50: log Z_k = log(2 pi / beta_k) / 2. What is infinite is right."""
    betas = torch.tensor([1.0, 3.0, 50.0], dtype=torch.float64)
    x = torch.randn(3, 200_000, generator=seed(), dtype=torch.float64) / betas[:, None].sqrt()
    found = log_ratios(x.square() / 2, betas)
    torch.testing.assert_close(found, -(betas[1:] / betas[:-1]).log() / 2, rtol=0, atol=0.015)
    half = torch.cat([x.square() / 2, torch.full_like(x, math.inf)], dim=1)
    half[1:] = (x.square() / 2)[1:].repeat(1, 2)
    assert (log_ratios(half, betas)[0] - found[0] + math.log(2)).abs() < 0.02

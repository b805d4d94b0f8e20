"""Mixtures on manifolds are densities, and their samples are theirs."""

import math

import pytest
import torch
from hydra.utils import instantiate
from run import config
from scipy.stats import ks_1samp, vonmises_fisher
from torch import Generator

from divflow.data import Toy, toy
from divflow.data.toy import VonMisesFisherMixture, WrappedNormalMixture
from divflow.manifolds import ManifoldError, SpecialOrthogonal, Sphere, Torus

MAKE = {
    "sphere": toy.sphere_mixture,
    "torus": toy.torus_mixture,
    "rotations": lambda: toy.rotations_mixture(components=4, std=0.6),
}


def nodes(name):
    """Points and weights of a quadrature on the whole manifold, or independent uniform points."""
    if name == "sphere":
        z = torch.linspace(-1, 1, 401, dtype=torch.float64)
        z, angle = (z[1:] + z[:-1]) / 2, 2 * math.pi * torch.arange(400, dtype=torch.float64) / 400
        z, angle = (it.flatten() for it in torch.meshgrid(z, angle, indexing="ij"))
        points = torch.stack([(1 - z**2).sqrt() * angle.cos(), (1 - z**2).sqrt() * angle.sin(), z], dim=1)
        return points, 4 * math.pi / len(points)
    if name == "torus":
        angle = 2 * math.pi * torch.arange(200, dtype=torch.float64) / 200 - math.pi
        points = torch.cartesian_prod(angle, angle)
        return points, (2 * math.pi) ** 2 / len(points)
    torch.manual_seed(0)
    return SpecialOrthogonal().uniform(torch.float64).sample((200_000,)), 8 * math.pi**2 / 200_000


@pytest.mark.parametrize("name", MAKE)
def test_integrates_to_one_and_to_its_samples(name):
    density = MAKE[name]()
    points, weight = nodes(name)
    log_prob = density.log_prob(points)
    mass = log_prob.exp() * weight
    by_chance = name == "rotations"
    error = 5 * (mass * len(mass)).std() / math.sqrt(len(mass)) if by_chance else 1e-3
    assert abs(mass.sum() - 1) < error
    samples = density.sample(20_000, Generator().manual_seed(0))
    assert samples.dtype == torch.float32
    density.manifold.check(samples)
    # The means of some functions: a rotated or mirrored density has others.
    waves = torch.randn(6, points[0].numel(), generator=Generator().manual_seed(1), dtype=torch.float64).round() + 1
    values, of_samples = ((it.double().flatten(1) @ waves.T).sin() for it in (points, samples))
    expected = (mass[:, None] * values).sum(dim=0)
    chance = 5 * of_samples.std(dim=0) / math.sqrt(len(samples))
    assert ((of_samples.mean(dim=0) - expected).abs() < chance + (0.02 if by_chance else 1e-3)).all()
    entropy, of_them = -(mass * log_prob.clamp_min(-100)).sum(), -density.log_prob(samples)
    assert abs(of_them.mean() - entropy) < 5 * of_them.std() / math.sqrt(len(samples)) + (0.05 if by_chance else 2e-3)


@pytest.mark.parametrize("concentration", [1e-4, 0.5, 30.0, 1e5])
def test_von_mises_fisher_is_that_of_scipy(concentration):
    mean = Sphere(2).project(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64))
    density, theirs = VonMisesFisherMixture(mean, concentration), vonmises_fisher(mean[0].numpy(), concentration)
    samples = density.sample(3_000, Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    for x in (Sphere(2).project(samples), Sphere(2).uniform(torch.float64).sample((100,))):
        ours = density.log_prob(x)
        torch.testing.assert_close(ours, torch.from_numpy(theirs.logpdf(x.numpy())), rtol=1e-9, atol=1e-9)
    # 1 - cosine has the distribution function (1 - exp(-c v)) / (1 - exp(-2 c)).
    apart = (samples - mean).square().sum(dim=1) / 2

    def distribution(v):
        return torch.expm1(-concentration * torch.from_numpy(v)).numpy() / math.expm1(-2 * concentration)

    assert ks_1samp(apart.numpy(), distribution).pvalue > 1e-3


def test_huge_concentrations_are_normal_in_the_tangent_plane():
    mean = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    density = VonMisesFisherMixture(mean, 1e10)
    x = torch.tensor([[2e-5, 0.0, math.sqrt(1 - 4e-10)]], dtype=torch.float64)
    expected = math.log(1e10 / (2 * math.pi)) - 1e10 * 4e-10 / 2
    assert density.log_prob(x).item() == pytest.approx(expected, rel=1e-6)


def test_rotations_that_do_not_overlap_have_the_entropy_of_one():
    density = toy.rotations_mixture(components=3, std=0.05)
    samples = density.sample(20_000, Generator().manual_seed(0))
    of_them = -density.log_prob(samples)
    # Of a normal in the tangent space; what exp makes of its volume is less than std^2.
    expected = math.log(3) + 1.5 * (1 + math.log(2 * math.pi * 0.05**2))
    assert abs(of_them.mean() - expected) < 5 * of_them.std() / math.sqrt(20_000) + 0.05**2


@pytest.mark.parametrize("name", MAKE)
def test_seeded(name):
    density = MAKE[name]()
    before = torch.get_rng_state()
    a, b, c = (density.sample(10, Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(3)
    d, e = density.sample(10), density.sample(10)
    torch.manual_seed(3)
    assert torch.equal(density.sample(10), d)
    assert not torch.equal(d, e)
    other = getattr(toy, f"{name}_mixture")(seed=1)
    assert not torch.equal(other.means[0], getattr(toy, f"{name}_mixture")(seed=2).means[0])


@pytest.mark.parametrize(
    ("option", "manifold"), [("sphere", Sphere(2)), ("torus", Torus(2)), ("rotations", SpecialOrthogonal())]
)
def test_a_data_module_knows_the_truth_and_its_manifold(option, manifold):
    small = [
        "data.num_train=64",
        "data.num_val=20",
        "data.num_test=30",
        "data.density.components=5",
        "data.density.seed=2",
    ]
    data = instantiate(config(f"data={option}_mixture", *small).data, _convert_="all")
    assert repr(data.manifold) == repr(manifold)
    assert data.event_shape == tuple(manifold.event_shape)
    assert data.coordinates is None
    batch = next(iter(data.train_dataloader()))
    manifold.check(batch)
    assert torch.equal(data.transform(batch)[0].float(), batch)
    torch.testing.assert_close(data.log_prob(batch), data.density.log_prob(batch))
    assert len(data.density.means) == 5
    assert data.score(batch) is None


def test_a_density_in_the_plane_is_on_no_manifold():
    assert Toy("two_moons", num_train=2, num_val=2, num_test=2).manifold is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy.sphere_mixture(components=0), "components.*0"),
        (lambda: toy.sphere_mixture(concentration=0.0), r"concentration.*0\.0"),
        (lambda: toy.torus_mixture(std=-1.0), r"std must be positive.*-1\.0"),
        (lambda: toy.rotations_mixture(seed=-1), "seed.*-1"),
        (lambda: VonMisesFisherMixture(torch.ones(2, 3), 1.0), r"off Sphere\(2\) by up to 0\.423 in row 0, 1 of 2"),
        (lambda: toy.sphere_mixture().log_prob(torch.ones(1, 3)), r"off Sphere\(2\)"),
        (lambda: WrappedNormalMixture(Torus(2), torch.ones(2, 3), 1.0), r"shape \(2,\)"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises((ManifoldError, ValueError), match=message):
        make()

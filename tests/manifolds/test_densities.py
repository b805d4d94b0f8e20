"""Uniform and wrapped normal densities, against quadrature, closed forms and their own samples."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from spaces import MANIFOLDS, SYMMETRIC, points

from divflow.manifolds import Euclidean, ManifoldError, Product, SpecialOrthogonal, Sphere, Torus, hat

STDS = [0.1, 0.7, 2.0, 5.0]


def around(manifold, mean, direction, r):
    """Points at distances r from the mean, along a direction."""
    u = manifold.to_tangent(mean, direction)
    u = u / u.norm() * (2**0.5 if isinstance(manifold, SpecialOrthogonal) else 1)
    return manifold.exp(mean.expand(len(r), *mean.shape), r.view(-1, *[1] * mean.ndim) * u)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("name", ["circle", "sphere", "directions", "rotations"])
def test_the_wrapped_normal_integrates_to_one(name, std):
    """Over distances to the mean, of which a sphere has the area omega sin(r)^(d-1), and the rotations 4 pi (2 sin(r/2))^2."""
    manifold = SYMMETRIC[name]
    mean, direction = points(manifold, 2)
    density = manifold.wrapped_normal(mean, std)
    d, radius = manifold.dim, 2.0 if name == "rotations" else 1.0
    omega = 2 * math.pi ** (d / 2) / math.gamma(d / 2)

    def shell(r):
        p = density.log_prob(around(manifold, mean, direction, torch.tensor([r], dtype=torch.float64))).exp().item()
        return p * omega * (radius * math.sin(r / radius)) ** (d - 1)

    mass, _ = integrate.quad(shell, 0, math.pi, points=[min(6 * std, 3)], limit=200, epsrel=1e-10)
    assert mass == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("std", STDS)
def test_the_wrapped_normal_of_angles(std):
    torus, r = Torus(2, period=3.0), (torch.arange(60, dtype=torch.float64) + 0.5) / 60 * 3 - 1.5
    grid = torch.cartesian_prod(r, r)
    log_prob = torus.wrapped_normal(torch.tensor([0.4, -1.4], dtype=torch.float64), std).log_prob(grid)
    assert (log_prob.exp().mean() * 9).item() == pytest.approx(1, abs=1e-10)
    one = stats.norm(0.4, std).pdf(grid[:, :1].numpy() + 3 * np.arange(-60, 61)).sum(axis=1)
    other = stats.norm(-1.4, std).pdf(grid[:, 1:].numpy() + 3 * np.arange(-60, 61)).sum(axis=1)
    np.testing.assert_allclose(log_prob.numpy(), np.log(one * other), atol=1e-10)


def test_a_circle_is_an_angle():
    angle = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    mean = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for std in STDS:
        by_circle = Sphere(1).wrapped_normal(mean, std).log_prob(torch.cat([angle.cos(), angle.sin()], dim=1))
        torch.testing.assert_close(
            by_circle, Torus(1).wrapped_normal(torch.zeros(1, dtype=torch.float64), std).log_prob(angle)
        )


@pytest.mark.parametrize("std", [0.3, 1.5])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_samples_follow_their_density(name, std):
    """Distances to the mean are those of the normal in the tangent space, by as many turns as it takes; those of uniform samples have
    the density of shells."""
    manifold = SYMMETRIC[name]
    torch.manual_seed(0)
    mean = points(manifold, 1)[0]
    samples = manifold.wrapped_normal(mean, std).sample((4000,))
    manifold.check(samples)
    if isinstance(manifold, Torus):
        folded = np.abs((manifold.log(mean, samples)[:, 0] / manifold.period).numpy())
        drawn = np.random.default_rng(0).normal(0, std / manifold.period, 4000)
        expected = np.abs(drawn - np.round(drawn))
    else:
        folded = manifold.distance(mean, samples).numpy()
        drawn = stats.chi(manifold.dim).rvs(4000, random_state=0) * std
        expected = np.abs(drawn - 2 * math.pi * np.round(drawn / (2 * math.pi)))
    assert stats.ks_2samp(folded, expected).pvalue > 1e-3


@pytest.mark.parametrize("name", SYMMETRIC)
def test_uniform_samples(name):
    manifold = SYMMETRIC[name]
    torch.manual_seed(0)
    uniform = manifold.uniform(torch.float64)
    samples = uniform.sample((4000,))
    torch.testing.assert_close(
        uniform.log_prob(samples), torch.full((4000,), -math.log(manifold.volume), dtype=torch.float64)
    )
    x = points(manifold, 1)[0]
    if isinstance(manifold, Torus):
        found = stats.kstest(samples[:, 0].numpy() / manifold.period + 0.5, "uniform")
    else:
        radius = 2.0 if name == "rotations" else 1.0
        grid = np.linspace(0, math.pi, 2001)
        shells = integrate.cumulative_trapezoid(np.sin(grid / radius) ** (manifold.dim - 1), grid, initial=0)
        found = stats.kstest(manifold.distance(x, samples).numpy(), lambda r: np.interp(r, grid, shells / shells[-1]))
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("name", MANIFOLDS)
def test_derivatives_of_the_log_density(name):
    """In the point along the manifold, and in the width, by central differences; at the mean as well."""
    manifold = MANIFOLDS[name]
    x, mean = points(manifold, 3, 0), points(manifold, 1, 9)[0]
    width = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    at = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, s: manifold.wrapped_normal(mean, s).log_prob(manifold.project(y)), (at, width)
    )
    narrow = manifold.wrapped_normal(mean, 0.2)
    u = manifold.to_tangent(mean, torch.randn(mean.shape, dtype=mean.dtype, generator=torch.Generator().manual_seed(1)))
    along = lambda s: narrow.log_prob(manifold.exp(mean, s * u))  # noqa: E731
    zero = torch.zeros((), dtype=torch.float64)
    squared = u.square().sum() / 2 if name == "rotations" else u.square().sum()
    if name != "product":
        curvature = (
            0.0
            if name in ("circle", "radians", "degrees", "plane")
            else (manifold.dim - 1) / (12 if name == "rotations" else 3)
        )
        expected = (-1 / 0.2**2 + curvature) * squared
        torch.testing.assert_close(torch.func.grad(torch.func.grad(along))(zero), expected)
    torch.testing.assert_close(torch.func.grad(along)(zero), zero)


def test_gradients_of_samples():
    """Those of a mean square distance to the mean, 2 d std, before anything winds."""
    torch.manual_seed(0)
    for manifold in (Sphere(2), SpecialOrthogonal(), Torus(3)):
        std = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        mean = points(manifold, 1)[0]
        distances = manifold.distance(mean, manifold.wrapped_normal(mean, std).rsample((20000,)))
        (gradient,) = torch.autograd.grad(distances.square().mean(), std)
        assert gradient.item() == pytest.approx(2 * manifold.dim * 0.1, rel=0.03)


def test_mixtures():
    means = points(Sphere(2), 5)
    weights = torch.distributions.Categorical(torch.ones(5, dtype=torch.float64))
    mixture = torch.distributions.MixtureSameFamily(weights, Sphere(2).wrapped_normal(means, 0.2), validate_args=False)
    samples = mixture.sample((50,))
    by_parts = torch.stack([Sphere(2).wrapped_normal(mean, 0.2).log_prob(samples) for mean in means]).logsumexp(
        0
    ) - math.log(5)
    torch.testing.assert_close(mixture.log_prob(samples), by_parts)


def test_products_add_their_parts():
    product = Product(way=Sphere(2), place=Euclidean(2))
    mean = points(product, 1)[0]
    density = product.wrapped_normal(mean, {"way": 0.3, "place": 2.0})
    x = density.sample((7,))
    parts, means = product.split(x), product.split(mean)
    expected = Sphere(2).wrapped_normal(means["way"], 0.3).log_prob(parts["way"])
    normal = torch.distributions.Normal(means["place"], 2.0).log_prob(parts["place"]).sum(1)
    torch.testing.assert_close(density.log_prob(x), expected + normal)
    angles = Product(a=Torus(1), b=Sphere(1))
    torch.testing.assert_close(
        angles.uniform().log_prob(angles.uniform().sample((3,))), torch.full((3,), -2 * math.log(2 * math.pi))
    )


def test_half_turns_of_rotations_have_one_density():
    """Both logarithms of a half turn are as long."""
    axis = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    density = SpecialOrthogonal().wrapped_normal(eye, 1.0)
    ends = [SpecialOrthogonal().exp(eye, hat(angle * axis)) for angle in (math.pi - 1e-9, -math.pi + 1e-9)]
    torch.testing.assert_close(density.log_prob(ends[0]), density.log_prob(ends[1]))


def test_bad_arguments():
    sphere, mean = Sphere(2), torch.tensor([0.0, 0.0, 1.0])
    for std, message in [
        (0.0, "positive"),
        (math.nan, "positive"),
        (-1.0, "positive"),
        (torch.ones(3), "one for each of the means"),
    ]:
        with pytest.raises(ManifoldError, match=message):
            sphere.wrapped_normal(mean, std)
    with pytest.raises(ManifoldError, match="off"):
        sphere.wrapped_normal(2 * mean, 1.0)
    with pytest.raises(ManifoldError, match="off"):
        sphere.uniform().log_prob(2 * mean)
    with pytest.raises(ManifoldError, match="infinite"):
        Euclidean(2).uniform()
    with pytest.raises(ManifoldError, match="for each of the parts"):
        Product(a=sphere).wrapped_normal(mean, {"b": 1.0})
    with pytest.raises(ValueError, match="period"):
        Torus(2, period=0)
    with pytest.raises(ValueError, match="d must be"):
        Sphere(0)

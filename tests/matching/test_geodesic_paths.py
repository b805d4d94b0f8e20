"""Geodesic paths: ends, known cases, the velocity of one datum, noise, and what they refuse."""

import math

import pytest
import torch
from torch import Generator

from divflow.manifolds import Euclidean, ManifoldError, Product, SpecialOrthogonal, Sphere, Torus
from divflow.matching import ConditionalFlowMatching, GeodesicPath, LinearPath

MANIFOLDS = {
    "circle": Sphere(1),
    "sphere": Sphere(2),
    "degrees": Torus(2, period=360),
    "rotations": SpecialOrthogonal(),
    "product": Product(direction=Sphere(2), orientation=SpecialOrthogonal(), angles=Torus(2)),
}
each_manifold = pytest.mark.parametrize("manifold", MANIFOLDS.values(), ids=MANIFOLDS)


def uniform(manifold, count, seed=0):
    like = torch.empty(count, *manifold.event_shape, dtype=torch.float64)
    return GeodesicPath(manifold).noise(like, Generator().manual_seed(seed))


@each_manifold
def test_from_noise_to_the_datum(manifold):
    noise, data = uniform(manifold, 5), uniform(manifold, 5, 1)
    t = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    point = GeodesicPath(manifold)(t, noise, data)
    back = manifold.log(data, noise) * (1 - t).view(-1, *[1] * (data.ndim - 1))
    torch.testing.assert_close(point.x, manifold.exp(data, back))
    torch.testing.assert_close(point.x[-1], data[-1], rtol=0, atol=1e-15)
    step = 1e-4
    before, behind = (GeodesicPath(manifold)(t + by, noise, data).x for by in (-step, step))
    torch.testing.assert_close(point.velocity, manifold.log(point.x, behind) / step, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(point.velocity, -manifold.log(point.x, before) / step, rtol=1e-6, atol=1e-6)


def test_in_euclidean_space_it_is_linear():
    noise, data = torch.randn(2, 6, 3, generator=Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(GeodesicPath(Euclidean(3))(t, noise, data), LinearPath()(t, noise, data))


def test_a_circle_is_an_angle():
    noise, data = uniform(Torus(1), 40), uniform(Torus(1), 40, 1)
    t = torch.linspace(0, 1, 40, dtype=torch.float64)
    angle = GeodesicPath(Torus(1))(t, noise, data)
    on_circle = lambda a: torch.cat([a.cos(), a.sin()], dim=1)  # noqa: E731
    circle = GeodesicPath(Sphere(1))(t, on_circle(noise), on_circle(data))
    torch.testing.assert_close(circle.x, on_circle(angle.x))
    torch.testing.assert_close(circle.velocity, angle.velocity * torch.cat([-angle.x.sin(), angle.x.cos()], dim=1))


@each_manifold
def test_the_velocity_towards_one_datum_is_known(manifold):
    """All paths through a point have one velocity, so that the objective vanishes there, and nowhere else."""
    datum = uniform(manifold, 1, 7)
    data = datum.expand(64, *datum.shape[1:])

    def velocity(t, x):
        return manifold.log(x, data) / (1 - t).view(-1, *[1] * (x.ndim - 1))

    objective = ConditionalFlowMatching(path=GeodesicPath(manifold))
    losses = objective(velocity, data, Generator().manual_seed(0))
    assert losses.shape == (64,)
    assert losses.max() < 1e-10
    off = objective(lambda t, x: 2 * velocity(t, x), data, Generator().manual_seed(0))
    noise = GeodesicPath(manifold).noise(data, Generator().manual_seed(0))
    velocities = manifold.geodesic(data, noise, torch.zeros(()))[1]
    torch.testing.assert_close(off, velocities.flatten(1).square().mean(dim=1))


def test_noise_follows_the_generator_alone():
    x = torch.empty(2000, 3)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    path = GeodesicPath(Sphere(2))
    drawn = [path.noise(x, Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].dtype == torch.float32
    assert drawn[0].mean(dim=0).abs().max() < 5 * math.sqrt(1 / 3 / 2000)
    assert not torch.equal(path.noise(x), path.noise(x))


def test_what_is_refused():
    path, x = GeodesicPath(Sphere(2)), uniform(Sphere(2), 4)
    with pytest.raises(ManifoldError, match=r"off Sphere\(2\).*in row 1 of 4"):
        path(torch.tensor(0.5), x * torch.tensor([[1.0], [2], [1], [1]]), x)
    with pytest.raises(ManifoldError, match="NaN"):
        path(torch.tensor(0.5), x, x * math.nan)
    with pytest.raises(ManifoldError, match=r"such as Sphere\(2\), or derive from Manifold, but is 'sphere'"):
        GeodesicPath("sphere")
    with pytest.raises(ManifoldError, match="no uniform density"):
        ConditionalFlowMatching(path=GeodesicPath(Euclidean(3)))(lambda t, x: x, x)
    with pytest.raises(TypeError, match="generator"):
        path.noise(x, 3)


def test_antipodal_pairs_stop_no_training():
    x = uniform(Sphere(1), 4).float()
    point = GeodesicPath(Sphere(1))(torch.full((4,), 0.5), -x, x)
    torch.testing.assert_close((point.x * x).sum(dim=1), torch.zeros(4), rtol=0, atol=2e-6)
    torch.testing.assert_close(point.velocity, math.pi * x, rtol=0, atol=1e-5)

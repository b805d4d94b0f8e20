"""Geodesics in time: their ends, and velocities by central differences, scipy's rotations and the logarithms at a point."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp
from spaces import MANIFOLDS, points

from divflow.manifolds import Manifold, ManifoldError, Product, SpecialOrthogonal, Sphere, Torus

TIMES = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
each_manifold = pytest.mark.parametrize("name", MANIFOLDS)


def ends(manifold, dtype=torch.float64):
    return points(manifold, len(TIMES), 0, dtype), points(manifold, len(TIMES), 100, dtype)


@each_manifold
def test_from_end_to_end(name):
    manifold = MANIFOLDS[name]
    x, y = ends(manifold)
    for t, end in ((0.0, x), (1.0, y)):
        point, _ = manifold.geodesic(x, y, torch.tensor(t).double())
        assert manifold.distance(point, end).max() < 1e-7
    halfway, _ = manifold.geodesic(x, y, torch.tensor(0.5).double())
    torch.testing.assert_close(manifold.distance(x, halfway), manifold.distance(x, y) / 2)
    torch.testing.assert_close(manifold.distance(y, halfway), manifold.distance(x, y) / 2)


@each_manifold
def test_the_velocity_is_the_central_difference(name):
    manifold = MANIFOLDS[name]
    x, y = ends(manifold)
    point, velocity = manifold.geodesic(x, y, TIMES)
    step = 1e-4
    before, behind = (manifold.geodesic(x, y, TIMES + by)[0] for by in (-step, step))
    difference = manifold.log(before, behind) if isinstance(manifold, Torus) else behind - before
    torch.testing.assert_close(velocity, difference / (2 * step), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(manifold.to_tangent(point, velocity), velocity)


@each_manifold
def test_the_velocity_is_what_the_logarithms_leave(name):
    """Both ends are seen from a point of the geodesic in opposite directions, together as far as they are apart."""
    manifold = MANIFOLDS[name]
    x, y = ends(manifold)
    point, velocity = manifold.geodesic(x, y, TIMES)
    torch.testing.assert_close(velocity, manifold.log(point, y) - manifold.log(point, x))


@each_manifold
def test_by_exp_and_log_alone(name):
    """What a manifold of one's own gets by forward mode is the closed form; in batches of any shape, and in no_grad."""
    manifold = MANIFOLDS[name]
    x, y = ends(manifold)
    for t in (TIMES, TIMES[1]):
        with torch.no_grad():
            found = Manifold.geodesic(manifold, x, y, t)
        for ours, closed in zip(found, manifold.geodesic(x, y, t), strict=True):
            torch.testing.assert_close(ours, closed)
    twice = manifold.geodesic(torch.stack([x, y]), torch.stack([y, x]), torch.stack([TIMES, 1 - TIMES]))
    torch.testing.assert_close(manifold.distance(twice[0][0], twice[0][1]), torch.zeros_like(TIMES), rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[1][0], -twice[1][1])


def test_rotations_are_scipys():
    x, y = ends(SpecialOrthogonal())
    for i, t in enumerate(TIMES):
        expected = Slerp([0, 1], Rotation.from_matrix(torch.stack([x[i], y[i]]).numpy()))(t).as_matrix()
        torch.testing.assert_close(SpecialOrthogonal().geodesic(x[i], y[i], t)[0], torch.as_tensor(expected))


@each_manifold
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-5])
def test_points_that_are_almost_one(name, distance):
    """Their velocity is as long as their distance, and finite where that is zero; so is its derivative."""
    manifold = MANIFOLDS[name]
    x, y = ends(manifold)
    away = manifold.exp(x, distance * manifold.log(x, y)).requires_grad_()
    point, velocity = manifold.geodesic(x, away, TIMES)
    assert (manifold.distance(x, point) <= 1.01 * manifold.distance(x, away) + 1e-13).all()
    torch.testing.assert_close(
        velocity, distance * manifold.geodesic(x, y, TIMES)[1], rtol=0, atol=1e-9 + 30 * distance
    )
    (gradient,) = torch.autograd.grad(velocity.sum(), away)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("manifold", [Sphere(1), Sphere(2), Sphere(6), SpecialOrthogonal(), Torus(1)], ids=repr)
@pytest.mark.parametrize("short_of", [1e-2, 1e-4, 1e-5])
def test_the_longest_geodesics_in_float32(manifold, short_of):
    """They go a way of their length, to rounding; which one is as uncertain as the points are, relative to what they lack of antipodal."""
    x, other = points(manifold, 50, 0), points(manifold, 50, 9)
    u = manifold.log(x, other)
    y = manifold.exp(x, u * ((math.pi - short_of) / manifold.distance(x, other)).view(-1, *[1] * (x.ndim - 1)))
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    exact = manifold.geodesic(x, y, t)
    found = manifold.geodesic(x.float(), y.float(), t.float())
    for ours, closed in zip(found, exact, strict=True):
        assert (ours - closed).abs().max() < 1e-6 / short_of
    assert (manifold.geodesic(x.float(), y.float(), torch.ones(()))[0] - y).abs().max() < 3e-6
    assert manifold.off(found[0]).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_antipodal_points_are_joined_by_a_half_circle(d, dtype):
    """Only them: `log` refuses, and a pair beside them goes its own way."""
    sphere = Sphere(d)
    x, y = ends(sphere, dtype)
    alone = sphere.geodesic(x[1:], y[1:], TIMES[1:].to(dtype))
    y[0] = -x[0]
    with pytest.raises(ManifoldError, match="antipodal in row 0"):
        sphere.log(x, y)
    point, velocity = sphere.geodesic(x, y, TIMES.to(dtype))
    torch.testing.assert_close((point[1:], velocity[1:]), alone)
    t = torch.linspace(0, 1, 9, dtype=dtype)
    point, velocity = sphere.geodesic(x[:1].expand(9, -1), y[:1].expand(9, -1), t)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(sphere.distance(x[:1], point), math.pi * t, rtol=0, atol=tolerance)
    torch.testing.assert_close(velocity.norm(dim=1), torch.full_like(t, math.pi), rtol=0, atol=tolerance)
    assert (velocity * point).sum(dim=1).abs().max() < tolerance
    assert (point[-1] + x[0]).abs().max() < tolerance


def test_half_turns_take_one_of_two_ways():
    x = torch.eye(3, dtype=torch.float64)
    point, velocity = SpecialOrthogonal().geodesic(
        x, torch.diag(torch.tensor([-1.0, -1, 1])).double(), torch.tensor(0.5)
    )
    assert SpecialOrthogonal().distance(x, point) == pytest.approx(math.pi / 2)
    torch.testing.assert_close(
        velocity, point @ velocity.new_tensor([[0, -1, 0], [1, 0, 0], [0, 0, 0]]) * math.pi * point[1, 0]
    )
    point, velocity = Torus(1).geodesic(x[:1, 1], x[:1, 1] + math.pi, torch.tensor(0.5))
    torch.testing.assert_close((point, velocity), (-x[:1, 0] * math.pi / 2, -x[:1, 0] * math.pi))


def test_a_part_of_ones_own():
    class Ball(Manifold):
        event_shape, dim = torch.Size([3]), 2
        sphere = Sphere(2)

        def project(self, x):
            return self.sphere.project(x)

        def to_tangent(self, x, u):
            return self.sphere.to_tangent(x, u)

        def exp(self, x, u):
            return self.sphere.exp(x, u)

        def log(self, x, y):
            return self.sphere.log(x, y)

    own, known = Product(a=Ball(), b=Torus(2)), Product(a=Sphere(2), b=Torus(2))
    x, y = ends(known)
    torch.testing.assert_close(own.geodesic(x, y, TIMES), known.geodesic(x, y, TIMES))

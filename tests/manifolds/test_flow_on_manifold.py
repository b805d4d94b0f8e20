"""Flows on manifolds: densities that integrate to one, closed forms, symmetries, gradients along geodesics, refusals."""

import math

import pytest
import torch
from spaces import points
from torch import nn
from torch.distributions import Independent, Normal

from divflow.distributions import BaseError
from divflow.divergence import Exact, Hutchinson
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.manifolds import (
    Euclidean,
    ManifoldError,
    Product,
    SpecialOrthogonal,
    Sphere,
    TangentField,
    Torus,
    rotation_matrix,
)
from divflow.networks import MLP
from divflow.solver import Solver, SolverError

FINE = Solver(rtol=1e-8, atol=1e-8)
SPHERE, TORUS, ROTATIONS = Sphere(2), Torus(2), SpecialOrthogonal()
POSE = Product(orientation=SpecialOrthogonal(), angle=Torus(1), place=Euclidean(2))


class Velocity(nn.Module):
    """A network of ambient coordinates, of sines and cosines where these are angles."""

    def __init__(self, manifold, scale=3.0, context=0):
        super().__init__()
        torch.manual_seed(0)
        self.manifold, self.scale = manifold, scale
        self.angles = isinstance(manifold, Torus)
        size = manifold.event_shape.numel() * (2 if self.angles else 1)
        self.net = MLP(size, hidden=(24, 24), context_features=context).double()

    def features(self, x):
        if isinstance(self.manifold, Product):
            parts = self.manifold.split(x)
            return self.manifold.join(parts | {"angle": parts["angle"].sin()})
        return torch.cat([x.sin(), x.cos()], dim=1) if self.angles else x.flatten(1)

    def forward(self, t, x, context=None):
        value = self.net(t, self.features(x), context)
        return self.scale * value[:, : x[0].numel()].view_as(x)


def sphere_grid(n):
    """Points of equal areas in n rings of n, by the cosine of the latitude's complement."""
    z = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1
    longitude = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    z, longitude = torch.meshgrid(z, longitude, indexing="ij")
    r = (1 - z**2).sqrt()
    return torch.stack([r * longitude.cos(), r * longitude.sin(), z], dim=-1).view(-1, 3)


def flow_on(manifold, **options):
    velocity = options.pop("velocity", None) or Velocity(manifold)
    return ContinuousFlow(velocity, tuple(manifold.event_shape), manifold=manifold, **options)


@torch.no_grad()
def test_a_density_integrates_to_one_over_the_sphere():
    relative = (flow_on(SPHERE).log_prob(sphere_grid(80)) + math.log(SPHERE.volume)).exp()
    assert relative.max() > 3
    assert relative.mean() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_a_density_integrates_to_one_over_the_torus():
    angles = (torch.arange(60, dtype=torch.float64) + 0.5) * 2 * math.pi / 60 - math.pi
    flow = flow_on(TORUS, velocity=Velocity(TORUS, scale=12.0))
    relative = (flow.log_prob(torch.cartesian_prod(angles, angles)) + math.log(TORUS.volume)).exp()
    assert relative.max() > 3
    assert relative.mean() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_density_integrates_to_one_over_the_rotations():
    torch.manual_seed(1)
    x = ROTATIONS.uniform(torch.float64).sample((4_000,))
    relative = (flow_on(ROTATIONS).log_prob(x) + math.log(ROTATIONS.volume)).exp()
    error = relative.std() / len(x) ** 0.5
    assert error < 0.05
    assert (relative.mean() - 1).abs() < 4 * error


@torch.no_grad()
@pytest.mark.parametrize("likelihood", [Quadrature(), Quadrature(tolerance=1e-8), Augmented()])
@pytest.mark.parametrize("t_base", [0.0, 2.0])
def test_the_closed_form_of_a_gradient_flow(likelihood, t_base):
    """The flow of the gradient of x_3: atanh of x_3 moves with the time, and div v = -2 x_3."""
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    flow = flow_on(SPHERE, velocity=lambda t, x: up.expand_as(x), likelihood=likelihood, solver=FINE, t_base=t_base)
    x = points(SPHERE, 20)
    height, time = torch.atanh(x[:, 2]), 1 - t_base
    expected = 2 * (height.cosh().log() - (height - time).cosh().log()) - math.log(SPHERE.volume)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.atanh(flow.encode(x)[:, 2]), height - time, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("manifold", [SPHERE, ROTATIONS])
def test_turned_data_of_a_turned_network_have_the_same_density(manifold):
    velocity, x = Velocity(manifold), points(manifold, 12)
    turn = rotation_matrix(torch.tensor([0.5, 0.5, -0.1, math.sqrt(0.49)], dtype=torch.float64))

    def apply(matrix, x):
        return x @ matrix.T if manifold is SPHERE else matrix @ x

    def turned(t, x):
        return apply(turn, velocity(t, apply(turn.T, x)))

    found = flow_on(manifold, velocity=turned, solver=FINE).log_prob(apply(turn, x))
    torch.testing.assert_close(found, flow_on(manifold, velocity=velocity, solver=FINE).log_prob(x), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("manifold", [SPHERE, TORUS])
def test_samples_follow_the_density(manifold):
    """Means of functions over samples, against those over a grid, weighted with the density."""
    torch.manual_seed(2)
    flow = flow_on(manifold)
    if manifold is SPHERE:
        grid = sphere_grid(60)
    else:
        angles = (torch.arange(60, dtype=torch.float64) + 0.5) * 2 * math.pi / 60 - math.pi
        grid = torch.cartesian_prod(angles, angles)
    weights, samples = flow.log_prob(grid).exp(), flow.sample(4_000)

    def functions(x):
        return torch.cat([x.sin(), x.cos(), (2 * x).cos()], dim=1)

    expected = (weights[:, None] * functions(grid)).sum(dim=0) / weights.sum()
    values = functions(samples)
    error = values.std(dim=0) / len(samples) ** 0.5
    assert ((values.mean(dim=0) - expected).abs() < 4.5 * error + 1e-3).all()
    assert (expected.abs() > 10 * error).any()  # where the uniform density would be wrong


@pytest.mark.parametrize("manifold", [SPHERE, TORUS, ROTATIONS, POSE])
def test_both_ways_agree(manifold):
    flow = flow_on(manifold, solver=FINE)
    samples, log_prob = flow.rsample_and_log_prob(6)
    assert manifold.off(samples).max() < 1e-12
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=0, atol=2e-5)
    x = points(manifold, 6)
    assert manifold.distance(flow.decode(flow.encode(x)), x).max() < 1e-5
    path = flow.trajectory(x, [1.0, 0.5, 0.0])
    assert path.shape == (3, 6, *manifold.event_shape)
    assert manifold.off(path).max() < 1e-12


@pytest.mark.parametrize("manifold", [SPHERE, TORUS, ROTATIONS])
def test_gradients_along_geodesics(manifold):
    flow, x = flow_on(manifold, solver=FINE), points(manifold, 3)
    tangent = manifold.to_tangent(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double())
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow.log_prob(moving).sum(), moving)
    h = 1e-4
    with torch.no_grad():
        plus, minus = (flow.log_prob(manifold.exp(x, step * tangent)) for step in (h, -h))
    found = (gradient * tangent).flatten(1).sum(dim=1)
    torch.testing.assert_close(found, (plus - minus) / (2 * h), rtol=1e-4, atol=1e-4)


def test_gradients_in_parameters():
    """By both gradients of the solver, against a central difference."""
    velocity, x = Velocity(SPHERE), points(SPHERE, 3)
    parameter, h = velocity.net.layers[0].bias, 1e-5
    found = []
    for gradient in ("direct", "adjoint"):
        flow = flow_on(SPHERE, velocity=velocity, solver=Solver(rtol=1e-9, atol=1e-9, gradient=gradient))
        found.append(torch.autograd.grad(flow.log_prob(x).sum(), parameter)[0])
    with torch.no_grad():
        values = []
        for step in (h, -2 * h):
            parameter[0] += step
            values.append(flow.log_prob(x).sum())
        parameter[0] += h
    for gradient in found:
        assert gradient[0].item() == pytest.approx(((values[0] - values[1]) / (2 * h)).item(), rel=1e-3)


@torch.no_grad()
def test_estimates_and_the_augmented_solve():
    flow, x = flow_on(SPHERE), points(SPHERE, 2)
    expected = flow.log_prob(x)
    torch.manual_seed(4)
    found = flow.replace(estimator=Hutchinson()).log_prob(x.repeat(1_500, 1)).view(-1, 2)
    error = found.std(dim=0) / len(found) ** 0.5
    assert ((found.mean(dim=0) - expected).abs() < 4 * error + 1e-4).all()
    torch.testing.assert_close(flow.replace(likelihood=Augmented()).log_prob(x), expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_conditional_flow_and_its_distribution():
    flow = flow_on(SPHERE, velocity=Velocity(SPHERE, context=1))
    context = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    x = points(SPHERE, 1).expand(4, 3)
    log_prob = flow.log_prob(x, context)
    assert log_prob.std() > 0.01
    distribution = flow.distribution(context[0])
    torch.testing.assert_close(distribution.log_prob(x[0]), log_prob[0], rtol=0, atol=1e-4)
    assert SPHERE.off(distribution.sample((5,))).max() < 1e-6


@torch.no_grad()
def test_how_far_a_solve_leaves_the_manifold_is_reported_and_bounded():
    x = points(SPHERE, 5)
    assert flow_on(TORUS).evaluate(points(TORUS, 5)).off_manifold.max() == 0
    coarse, fine = (
        flow_on(SPHERE, solver=Solver("euler", options={"step_size": step})).evaluate(x).off_manifold.max()
        for step in (1 / 40, 1 / 400)
    )
    assert 5 < coarse / fine < 20  # of the first order
    assert flow_on(SPHERE).evaluate(x).off_manifold.max() < 1e-3
    assert ContinuousFlow(lambda t, x: -x, 2).evaluate(x[:, :2]).off_manifold is None
    with pytest.raises(SolverError, match=r"leaves Sphere\(2\) by up to .* take smaller steps"):
        flow_on(SPHERE, solver=Solver("euler", options={"step_size": 0.5})).log_prob(x)


def test_bases():
    x, mean = points(SPHERE, 4), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    still = ContinuousFlow(lambda t, x: torch.zeros_like(x), 3, manifold=SPHERE)
    torch.testing.assert_close(still.log_prob(x), torch.full((4,), -math.log(4 * math.pi), dtype=torch.float64))
    base = SPHERE.wrapped_normal(mean, 0.7)
    still = ContinuousFlow(lambda t, x: torch.zeros_like(x), 3, manifold=SPHERE, base=base)
    torch.testing.assert_close(still.log_prob(x), base.log_prob(x))
    still = ContinuousFlow(lambda t, x: torch.zeros_like(x), 12, manifold=POSE)
    y = points(POSE, 4)
    place = POSE.split(y)["place"]
    expected = Normal(0, 1).log_prob(place).sum(dim=1) - math.log(16 * math.pi**3)
    torch.testing.assert_close(still.log_prob(y), expected)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (
            Independent(Normal(torch.zeros(3), 1.0), 1),
            r"no density on Sphere\(2\), the flow's manifold: points are off",
        ),
        (Torus(3).uniform(), r"it is a density on Torus\(3"),
    ],
)
def test_bases_of_another_manifold_are_refused(base, words):
    with pytest.raises(BaseError, match=words):
        ContinuousFlow(lambda t, x: x, 3, manifold=SPHERE, base=base)


def test_other_refusals():
    with pytest.raises(ManifoldError, match=r"shape \(3,\), but the flow has event_shape=\(2,\)"):
        ContinuousFlow(lambda t, x: x, 2, manifold=SPHERE)
    with pytest.raises(ManifoldError, match="the velocity is a field on Torus"):
        ContinuousFlow(TangentField(lambda t, x: x, Torus(3)), 3, manifold=SPHERE)
    with pytest.raises(ManifoldError, match="must be one of divflow.manifolds"):
        ContinuousFlow(lambda t, x: x, 3, manifold="sphere")
    flow = flow_on(SPHERE)
    with pytest.raises(ManifoldError, match="off Sphere.2. by up to 0.5 in row 1"):
        flow.log_prob(torch.tensor([[1.0, 0, 0], [0, 1.5, 0]], dtype=torch.float64))
    with pytest.raises(ManifoldError, match="NaN or infinite in row 0"):
        flow.log_prob(torch.full((1, 3), math.nan, dtype=torch.float64))
    with pytest.raises(ManifoldError, match="off SpecialOrthogonal"):
        flow_on(ROTATIONS).log_prob(-torch.eye(3, dtype=torch.float64)[None])
    for network in (MLP(2), MLP(2, zero_init=True)):
        with pytest.raises(ManifoldError, match="the same point"):
            ContinuousFlow(network, 2, manifold=TORUS).log_prob(torch.rand(3, 2))
    with pytest.raises(ValueError, match="jacobian_norm is not known on manifolds"):
        flow.evaluate(points(SPHERE, 2), penalties=["jacobian_norm"])
    assert flow.evaluate(points(SPHERE, 2), penalties=["kinetic_energy"]).penalties["kinetic_energy"].min() > 0


def test_a_tangent_field_brings_its_manifold():
    velocity = Velocity(SPHERE)
    flow = ContinuousFlow(TangentField(velocity, SPHERE), 3)
    assert flow.manifold == SPHERE
    x = points(SPHERE, 3)
    torch.testing.assert_close(flow.log_prob(x), flow_on(SPHERE, velocity=velocity).log_prob(x))


@torch.no_grad()
def test_single_precision():
    flow, x = flow_on(SPHERE), points(SPHERE, 20)
    expected = flow.log_prob(x)
    torch.testing.assert_close(flow.float().log_prob(x.float()).double(), expected, rtol=0, atol=1e-3)


def test_the_closed_form_is_used():
    flow = ContinuousFlow(MLP(3, (64, 64)), 3, manifold=SPHERE)
    x = points(SPHERE, 64).float()
    assert Exact().explain(flow.field(), 0.5, x).method == "layered"

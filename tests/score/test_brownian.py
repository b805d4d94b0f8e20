"""Scores on manifolds, against the heat kernels of spheres, rotations and tori by their harmonics."""

import math

import numpy as np
import pytest
import torch
from torch import Generator, nn

from divflow.divergence import Autograd, Hutchinson
from divflow.flow.transforms import Affine
from divflow.likelihood import Quadrature
from divflow.manifolds import (
    Euclidean,
    Manifold,
    ManifoldError,
    Product,
    SpecialOrthogonal,
    Sphere,
    TangentField,
    Torus,
    hat,
)
from divflow.networks import MLP, HollowMLP, ManifoldFeatures
from divflow.score import BrownianMotion, ScaledScore, ScoreDensity, SDEError, probability_flow
from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
    TimeConditionalScoreMatching,
)
from divflow.score.sampling import PredictorCorrector, ProbabilityFlowODE, ReverseSDE, denoise
from divflow.solver import Solver

TORUS, SPHERE, ROTATIONS = Torus(2), Sphere(2), SpecialOrthogonal()
CURVED = {"sphere": SPHERE, "rotations": ROTATIONS}
MANIFOLDS: dict[str, Manifold] = {**CURVED, "torus": TORUS}
each_manifold = pytest.mark.parametrize("name", MANIFOLDS)


def origin(manifold):
    if manifold == ROTATIONS:
        return torch.eye(3, dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64)[2] if manifold == SPHERE else torch.zeros(2, dtype=torch.float64)


def log_kernel(manifold, x, variance):
    """The log-density of Brownian motion from the origin, whose variance along each direction is given, by its harmonics."""
    if manifold == TORUS:
        h = torch.arange(1, 13, dtype=x.dtype)
        waves = (2 * torch.exp(-h.square() * variance / 2) * torch.cos(h * x[..., None])).sum(dim=-1)
        return ((1 + waves) / (2 * math.pi)).log().sum(dim=-1)
    terms = [(2 * n + 1) * torch.exp(-n * (n + 1) / 2 * torch.as_tensor(variance).double()) for n in range(13)]
    if manifold == SPHERE:
        harmonics = [torch.ones_like(x[..., 2]), x[..., 2]]
        for n in range(1, 12):
            harmonics.append(((2 * n + 1) * x[..., 2] * harmonics[n] - n * harmonics[n - 1]) / (n + 1))
    else:
        twice = x.diagonal(dim1=-2, dim2=-1).sum(dim=-1) - 1  # 2 cos of the angle; characters by their recursion
        characters = [torch.ones_like(twice), 1 + twice]
        for n in range(1, 12):
            characters.append(twice * characters[n] - characters[n - 1])
        harmonics = characters
    return (sum(a * b for a, b in zip(terms, harmonics, strict=True)) / manifold.volume).log()


class KnownScore(nn.Module):
    """The gradient of the log-kernel in the manifold's metric, at a known variance or that of an SDE."""

    def __init__(self, manifold, sde=None, variance=None):
        super().__init__()
        self.manifold, self.sde, self.variance = manifold, sde, variance

    def forward(self, t, x):
        variance = self.sde.std(t).square() if self.variance is None else x.new_tensor(self.variance)
        at = x.detach().requires_grad_() if not x.requires_grad else x
        with torch.enable_grad():
            gradient = torch.autograd.grad(log_kernel(self.manifold, at, variance).sum(), at, create_graph=True)[0]
        return gradient / self.manifold.scale(x) ** 2


def grid(manifold):
    """Points and weights by which polynomials of moderate degree are integrated to rounding."""
    angle = torch.arange(18, dtype=torch.float64) * 2 * math.pi / 18 - math.pi
    if manifold == TORUS:
        return torch.cartesian_prod(angle, angle), torch.full((18**2,), manifold.volume / 18**2, dtype=torch.float64)
    height, weight = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(12))
    if manifold == SPHERE:
        z, a = torch.cartesian_prod(height, angle).T
        r = (1 - z**2).sqrt()
        return torch.stack([r * a.cos(), r * a.sin(), z], dim=1), weight.repeat_interleave(18) * 2 * math.pi / 18
    _, y, z = torch.eye(3, dtype=torch.float64)

    def turn(angles, axis):
        return ROTATIONS.exp(torch.eye(3).double().expand(len(angles), 3, 3), hat(angles[:, None] * axis))

    points = torch.einsum("aij,bjk,ckl->abcil", turn(angle, z), turn(height.acos(), y), turn(angle, z))
    weights = weight.repeat_interleave(18).repeat(18) * ROTATIONS.volume / 2 / 18**2
    return points.reshape(-1, 3, 3), weights


def wrong(manifold):
    """Another field than the score, of low degree."""
    mix = torch.randn(2, *origin(manifold).shape, generator=Generator().manual_seed(0), dtype=torch.float64)
    if manifold == TORUS:
        return TangentField(lambda t, x: mix[0] * x.sin() + mix[1] * x.flip(1).cos(), manifold)
    return TangentField(lambda t, x: mix[0] + mix[1] * x * x.flip(1), manifold)


@each_manifold
@pytest.mark.parametrize("variance", [0.3, 2.0])
def test_the_walk_has_the_harmonics_of_brownian_motion(name, variance):
    manifold = MANIFOLDS[name]
    sde = BrownianMotion(manifold=manifold)
    t = torch.tensor(math.log1p(variance / 1e-4) / (2 * math.log(300))).double()
    assert sde.std(t).square() == pytest.approx(variance)
    x = origin(manifold).expand(20_000, *manifold.event_shape)
    noisy, _ = sde.diffuse(x, t, Generator().manual_seed(0))
    manifold.check(noisy)
    if name == "torus":
        found, rate = noisy.cos().mean(dim=1), 1 / 2
    else:
        found, rate = (noisy * x).flatten(1).sum(dim=1), 1.0  # the trace is 1 + 2 cos, the character of n = 1
    mean = {"torus": 1, "sphere": 1, "rotations": 3}[name] * math.exp(-rate * variance)
    error = found.std().item() / math.sqrt(20_000)
    assert found.mean().item() == pytest.approx(mean, abs=5 * error + 0.01)
    assert error < 0.01


def test_one_step_of_the_walk_would_be_seen():
    """By the mean of cos |v|, v normal, which is 1 - 2 D(1 / sqrt(2)) of Dawson's function for a variance of 1, and not exp(-1)."""
    x = origin(SPHERE).expand(100_000, 3)
    t = torch.tensor(math.log1p(1e4) / (2 * math.log(300))).double()
    means = [
        BrownianMotion(manifold=SPHERE, steps=steps).diffuse(x, t, Generator().manual_seed(0))[0][:, 2].mean().item()
        for steps in (1, 16)
    ]
    assert means == pytest.approx([1 - math.sqrt(2) * 0.512, math.exp(-1)], abs=0.01)


@each_manifold
def test_noise_is_standard_normal_in_the_metric(name):
    manifold = MANIFOLDS[name]
    sde, x = BrownianMotion(manifold=manifold), origin(manifold).expand(50_000, *manifold.event_shape)
    noise = sde.noise(x, Generator().manual_seed(0))
    torch.testing.assert_close(manifold.to_tangent(x, noise), noise)
    squared = (noise * manifold.scale(noise)).flatten(1).square().sum(dim=1)
    assert squared.mean().item() == pytest.approx(manifold.dim, rel=0.02)
    small = manifold.distance(x, manifold.exp(x, 1e-3 * noise)) / 1e-3
    torch.testing.assert_close(small.square(), squared, rtol=1e-4, atol=1e-6)


@each_manifold
@pytest.mark.parametrize(
    "objective",
    [
        ImplicitScoreMatching(),
        ImplicitScoreMatching(Hutchinson(10)),
        SlicedScoreMatching(10),
        SlicedScoreMatching(10, variance_reduction=True),
        FiniteDifferenceScoreMatching(10, variance_reduction=True, step=1e-3),
    ],
    ids=["exact", "probes", "sliced", "sliced, norm itself", "differences"],
)
def test_objectives_are_half_the_fisher_divergence(name, objective):
    """|s - s*|^2 / 2 - |s*|^2 / 2 in the metric, under a density with the score s*; integrated over a grid."""
    manifold = MANIFOLDS[name]
    x, weights = grid(manifold)
    p = log_kernel(manifold, x, 0.6).exp() * weights
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    field, zero = wrong(manifold), torch.zeros((), dtype=torch.float64)
    truth = manifold.to_tangent(x, KnownScore(manifold, variance=0.6)(zero, x).detach())
    lengths = lambda u: (u * manifold.scale(u)).flatten(1).square().sum(dim=1)  # noqa: E731
    expected = (p * (lengths(field(zero, x) - truth) - lengths(truth))).sum() / 2
    found = torch.stack([(p * objective(field, x, generator=Generator().manual_seed(i))).sum() for i in range(12)])
    error = found.std().item() / math.sqrt(12)
    assert error < 0.03
    assert found.mean().item() == pytest.approx(expected.item(), abs=5 * error + 1e-6)


@each_manifold
def test_the_score_is_the_riemannian_gradient(name):
    """By central differences along geodesics of unit speed."""
    manifold = MANIFOLDS[name]
    x = manifold.uniform(torch.float64).sample((5,))
    score = manifold.to_tangent(x, KnownScore(manifold, variance=0.6)(torch.zeros(()), x).detach())
    along = BrownianMotion(manifold=manifold).noise(x, Generator().manual_seed(0))
    ahead, behind = (log_kernel(manifold, manifold.exp(x, step * along), 0.6) for step in (1e-5, -1e-5))
    inner = (score * along * manifold.scale(x) ** 2).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


def known(manifold, epsilon=0.75):
    sde = BrownianMotion(manifold=manifold, epsilon=epsilon)
    flow = probability_flow(
        KnownScore(manifold, sde),
        sde,
        solver=Solver("dopri5", rtol=1e-5, atol=1e-5),
        likelihood=Quadrature(tolerance=1e-4),
    ).double()
    return sde, flow


@each_manifold
def test_the_probability_flow_has_the_density_of_brownian_motion(name):
    """At epsilon, where the variance is 0.5."""
    manifold = MANIFOLDS[name]
    sde, flow = known(manifold)
    x = manifold.uniform(torch.float64).sample((3,))
    found = flow.evaluate(x)
    expected = log_kernel(manifold, x, sde.std(torch.tensor(0.75).double()).square())
    # At T, where the variance is 9, the base is uniform and p_T nearly.
    leftover = log_kernel(manifold, found.latent, torch.tensor(9.0)) + math.log(manifold.volume)
    torch.testing.assert_close(found.log_prob + leftover, expected, rtol=0, atol=2e-4)
    assert leftover.abs().max() < 0.05


@each_manifold
@pytest.mark.parametrize(
    "make",
    [
        ProbabilityFlowODE,
        lambda sde: ReverseSDE(sde, 100, denoise=False),
        lambda sde: PredictorCorrector(sde, 60, denoise=False),
    ],
    ids=["ode", "walk", "corrected"],
)
def test_samplers(name, make):
    manifold = MANIFOLDS[name]
    sde, flow = known(manifold, epsilon=0.8)
    density = ScoreDensity(flow, Affine(), make(sde))
    samples = density.sample(2000, generator=Generator().manual_seed(0))
    manifold.check(samples)
    variance = sde.std(torch.tensor(0.8).double()).square().item()
    found = samples.cos().mean(dim=1) if name == "torus" else (samples * origin(manifold)).flatten(1).sum(dim=1)
    mean = {"torus": 1, "sphere": 1, "rotations": 3}[name] * math.exp(-variance / (2 if name == "torus" else 1))
    assert found.mean().item() == pytest.approx(mean, abs=5 * found.std().item() / math.sqrt(2000) + 0.01)


def test_denoising_ends_near_the_datum():
    """Of data that are one point, Tweedie's formula finds it from any noise that is small."""
    for manifold in MANIFOLDS.values():
        sde = BrownianMotion(manifold=manifold)
        x = manifold.exp(origin(manifold), 0.05 * sde.noise(origin(manifold)[None]))
        at = torch.tensor(math.log1p(0.3**2 / 1e-4) / (2 * math.log(300))).double()
        score = TangentField(KnownScore(manifold, sde), manifold)
        assert manifold.distance(denoise(score, sde, x, at), origin(manifold)).max() < 0.01


def test_on_tori_the_score_given_a_datum_is_known():
    torus = Torus(2, period=3.0)
    sde, x = BrownianMotion(manifold=torus), torch.rand(50, 2, dtype=torch.float64) * 3
    t = torch.linspace(0.3, 1, 50, dtype=torch.float64)
    noisy, score = sde.diffuse(x, t, Generator().manual_seed(0))
    turns = 3 * torch.arange(-30, 31, dtype=torch.float64)
    away = (noisy - x)[..., None] + turns
    weights = (-away.square() / (2 * sde.std(t)[:, None, None] ** 2)).softmax(dim=-1)
    torch.testing.assert_close(score, -(weights * away).sum(dim=-1) / sde.std(t)[:, None] ** 2)
    field = TangentField(lambda t, x: x.sin(), torus)
    losses = TimeConditionalScoreMatching(sde, DenoisingScoreMatching())(field, x, t, Generator().manual_seed(0))
    expected = (noisy.sin() - score).square().sum(dim=1) / 2 * sde.std(t).square()
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("data_std", [1.0, None])
def test_networks_keep_points_in_their_place(data_std):
    """What is scaled is the value alone, so that periods stay; its own divergence as well."""
    sde, x = BrownianMotion(manifold=TORUS), torch.rand(6, 2, dtype=torch.float64) * 6
    net = HollowMLP(2).double()
    score = ScaledScore(net, sde, data_std)
    t = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    sigma = sde.std(t)
    time, gain = (t, 1 / sigma) if data_std is None else (sigma.log() / 4, 1 / (sigma * (1 + sigma**2).sqrt()))
    torch.testing.assert_close(score(t, x), gain[:, None] * net(time, x))
    value, own = score.value_and_divergence(t, x)
    torch.testing.assert_close((value, own), (score(t, x), Autograd()(score, t, x).divergence))


@each_manifold
def test_a_network_that_starts_at_zero_is_uniform(name):
    manifold = MANIFOLDS[name]
    sde = BrownianMotion(manifold=manifold)
    features = ManifoldFeatures(manifold, waves=8)
    net = MLP(tuple(manifold.event_shape), hidden=(16,), zero_init=True, features=features)
    density = ScoreDensity(probability_flow(ScaledScore(net, sde), sde), Affine())
    x = manifold.uniform().sample((4,))
    torch.testing.assert_close(density.log_prob(x), torch.full((4,), -math.log(manifold.volume)), rtol=1e-4, atol=1e-4)
    loss = TimeConditionalScoreMatching(sde, ImplicitScoreMatching())(density.score_field, x).mean()
    loss.backward()
    assert sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None) > 0


def test_what_is_refused():
    with pytest.raises(SDEError, match=r"on Euclidean\(2\) never become uniform"):
        BrownianMotion(manifold=Product(way=SPHERE, place=Euclidean(2)).parts["place"])
    with pytest.raises(ManifoldError, match="but is 3"):
        BrownianMotion(manifold=3)
    with pytest.raises(SDEError, match=r"Sphere\(2\) have shape \(3,\), but event_shape=\(2,\)"):
        BrownianMotion(event_shape=2, manifold=SPHERE)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, but is 0"):
        BrownianMotion(manifold=SPHERE, steps=0)
    with pytest.raises(ValueError, match=r"denoising needs.*not known on Sphere\(2\).*objective=implicit"):
        TimeConditionalScoreMatching(BrownianMotion(manifold=SPHERE))
    field = TangentField(lambda t, x: x, SPHERE)
    with pytest.raises(ManifoldError, match="off"):
        TimeConditionalScoreMatching(BrownianMotion(manifold=SPHERE), ImplicitScoreMatching())(field, torch.ones(2, 3))

"""What a user's function does to what it is given in place is nobody else's: neither the caller's, nor the solver's."""

import math

import pytest
import torch
from catalogue import KINDS
from torch import nn

from divflow.adapters import from_flow_matching, from_torchcfm
from divflow.divergence import (
    Exact,
    check_field,
    value_and_divergence,
)
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.matching import ConditionalFlowMatching
from divflow.matching.path import AffinePath, LinearPath, Path, PathCoefficients, PathPoint
from divflow.score import VariancePreserving
from divflow.score.objectives import DenoisingScoreMatching, ImplicitScoreMatching, TimeConditionalScoreMatching
from divflow.score.sampling import PredictorCorrector, ProbabilityFlowODE, ReverseSDE
from divflow.score.sde import SDE
from divflow.solver import Solver

ESTIMATORS = KINDS | {"forward": Exact("forward")}
POINT = torch.tensor([[0.5, -0.3], [0.1, 0.7], [1.0, 0.2]], dtype=torch.float64)
TIMES = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)


def spoil(t, x):
    """-(1 + t) x, by writing to all that it is given."""
    t.add_(1)
    return x.mul_(-t.reshape(-1, 1) if t.ndim else -t)


def clean(t, x):
    return -(1 + (t.reshape(-1, 1) if t.ndim else t)) * x


@pytest.mark.parametrize("t", [torch.tensor(0.5, dtype=torch.float64), TIMES], ids=["scalar", "per sample"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_divergences(name, t):
    x, time = POINT.clone(), t.clone()
    for _ in range(3):
        torch.manual_seed(0)
        found = value_and_divergence(spoil, time, x, ESTIMATORS[name])
        torch.manual_seed(0)
        expected = value_and_divergence(clean, t, POINT, ESTIMATORS[name])
        torch.testing.assert_close(found, expected)
    check_field(spoil, time, x)
    assert torch.equal(x, POINT)
    assert torch.equal(time, t)


FIRST_LAYERS = {
    "elu": lambda: nn.ELU(inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.0, inplace=True),
}


@pytest.mark.parametrize("layer", FIRST_LAYERS)
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("likelihood", [Quadrature(), Augmented()], ids=["quadrature", "augmented"])
def test_a_first_layer_that_works_in_place(layer, gradient, likelihood):
    class Velocity(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            torch.manual_seed(1)
            self.first = FIRST_LAYERS[layer]()
            self.first.inplace = in_place
            self.last = nn.Linear(2, 2).double()

        def forward(self, t, x):
            return self.last(self.first(x))

    results = []
    for in_place in (True, False):
        x = POINT.clone()
        flow = ContinuousFlow(Velocity(in_place), 2, likelihood=likelihood, solver=Solver(gradient=gradient))
        log_prob = flow.log_prob(x)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), list(flow.parameters()))))
        assert torch.equal(x, POINT)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler", "implicit_adams"])
def test_flows(method):
    x, solver = POINT.clone(), Solver(method, options={"step_size": 0.01} if method != "dopri5" else None)
    flows = [ContinuousFlow(field, 2, solver=solver) for field in (spoil, clean)]
    torch.testing.assert_close(flows[0].log_prob(x), flows[1].log_prob(x))
    truth = -math.log(2 * math.pi) - POINT.square().sum(1) * math.exp(3) / 2 + 3
    torch.testing.assert_close(flows[0].log_prob(x), truth, rtol=0.05 if method == "euler" else 1e-3, atol=0.0)
    torch.testing.assert_close(flows[0].encode(x), flows[1].encode(x))
    torch.testing.assert_close(flows[0].trajectory(x, [1.0, 0.5, 0.0]), flows[1].trajectory(x, [1.0, 0.5, 0.0]))
    assert torch.equal(x, POINT)


def test_contexts():
    def velocity(t, x, context):
        return x.mul_(context.mul_(2))

    context, x = torch.full((3, 1), 0.3, dtype=torch.float64), POINT.clone()
    flow = ContinuousFlow(velocity, 2)
    torch.testing.assert_close(flow.evaluate(x, context).log_det, torch.full((3,), -1.2, dtype=torch.float64))
    assert (context == 0.3).all()
    assert torch.equal(x, POINT)
    assert (flow.sample(3, context.float()) != 0).all()


def test_targets():
    def log_target(x):
        x -= 1.0
        return -x.square().sum(1) / 2

    flow = ContinuousFlow(lambda t, x: 0.3 * x, 2)
    weights = flow.importance_weights(log_target, 20_000, torch.Generator().manual_seed(0))
    mean = (weights.log_weights.softmax(0)[:, None] * weights.samples).sum(0)
    torch.testing.assert_close(mean, torch.ones(2), rtol=0.0, atol=0.05)


@pytest.mark.parametrize("make", [from_flow_matching, from_torchcfm])
def test_adapted_models(make):
    def model(*given):
        t, x = sorted(given, key=lambda it: it.ndim)
        return spoil(t, x)

    flow = make(lambda x, t: model(t, x), (2,)) if make is from_flow_matching else make(lambda t, x: model(t, x), (2,))
    x = POINT.float()
    torch.testing.assert_close(flow.log_prob(x), ContinuousFlow(clean, 2).log_prob(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(x, POINT.float())


SDES = VariancePreserving(event_shape=2)


def score(t, x):
    t.mul_(0)
    return x.mul_(-1)


@pytest.mark.parametrize(
    "objective",
    [DenoisingScoreMatching(sigma=0.3), ImplicitScoreMatching(), TimeConditionalScoreMatching(SDES)],
    ids=lambda it: type(it).__name__,
)
def test_score_objectives(objective):
    x = POINT.clone()
    losses = [objective(f, x, generator=torch.Generator().manual_seed(0)) for f in (score, lambda t, x: -x)]
    torch.testing.assert_close(*losses)
    assert torch.equal(x, POINT)


@pytest.mark.parametrize("sampler", [ProbabilityFlowODE(SDES), ReverseSDE(SDES, 20), PredictorCorrector(SDES, 10)])
def test_samplers(sampler):
    first, second = (sampler(f, 4, torch.Generator().manual_seed(0)).samples for f in (score, lambda t, x: -x))
    torch.testing.assert_close(first, second)
    assert second.std() < 3


def test_flow_matching():
    x = POINT.clone()
    losses = [
        ConditionalFlowMatching()(field, x, torch.Generator().manual_seed(0), t=TIMES) for field in (spoil, clean)
    ]
    torch.testing.assert_close(*losses)
    assert torch.equal(x, POINT)


def test_schedules():
    """The SDE's and the path's own functions of time."""

    class Brownian(SDE):
        def mean_scale(self, t):
            return t.mul_(0).add_(1)

        def std(self, t):
            return t.sqrt_()

    class Straight(AffinePath):
        def coefficients(self, t):
            ones = torch.ones_like(t)
            return PathCoefficients(t.clone(), t.mul_(-1).add_(1), ones, -ones)

    class Shifted(Path):
        def __call__(self, t, noise, data):
            return PathPoint(data.sub_(noise).mul_(t[:, None]).add_(noise), data.clone())

    t, x = TIMES.clone(), POINT.clone()
    assert torch.equal(Shifted()(t, noise=x, data=x).x, POINT)
    assert torch.equal(x, POINT)
    sde = Brownian(epsilon=1e-3)
    torch.testing.assert_close(sde.diffusion(t), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(sde.marginal(t).std, TIMES.sqrt())
    for found, expected in zip(Straight()(t, POINT, 2 * POINT), LinearPath()(TIMES, POINT, 2 * POINT), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(t, TIMES)

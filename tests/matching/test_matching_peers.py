"""The losses of the packages flow_matching and torchcfm, on the same draws: pip install -c constraints.txt -e ".[peers]"."""

import itertools

import pytest
import torch
from torch import nn

from divflow.matching import (
    ConditionalFlowMatching,
    LinearPath,
    OptimalTransportCoupling,
    TrigonometricPath,
    VariancePreservingPath,
)

DTYPES = [torch.float32, torch.float64]
EVENTS = [(2,), (3, 4, 4)]
each_case = pytest.mark.parametrize(("event", "dtype"), list(itertools.product(EVENTS, DTYPES)), ids=str)


class Velocity(nn.Module):
    def __init__(self, event, dtype):
        super().__init__()
        size = torch.Size(event).numel()
        layers = nn.Linear(size + 1, 32), nn.Tanh(), nn.Linear(32, size)
        self.net = nn.Sequential(*layers).to(dtype)

    def forward(self, t, x):
        return self.net(torch.cat([x.flatten(1), t[:, None]], dim=1)).view_as(x)


def draws(event, dtype):
    """Noise, data and times."""
    return (*(torch.randn(32, *event, dtype=dtype) for _ in range(2)), torch.rand(32, dtype=dtype))


def compare(objective, event, dtype, theirs):
    """Our loss and its gradient against `theirs(velocity, noise, data, t)`."""
    net, (noise, x, t) = Velocity(event, dtype), draws(event, dtype)
    ours = objective(net, x, t=t, noise=noise).mean()
    other = theirs(net, noise, x, t)
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
    for mine, their in zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (ours, other)), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)


def flow_matching(name):
    reason = "needs the package flow_matching, of the extra peers"
    paths = pytest.importorskip("flow_matching.path", reason=reason)
    schedulers = pytest.importorskip("flow_matching.path.scheduler", reason=reason)
    return paths.AffineProbPath(getattr(schedulers, f"{name}Scheduler")())


@each_case
@pytest.mark.parametrize(("name", "path"), [("CondOT", LinearPath()), ("Cosine", TrigonometricPath())])
def test_flow_matching(name, path, event, dtype):
    peer = flow_matching(name)

    def theirs(net, noise, x, t):
        sample = peer.sample(x_0=noise, x_1=x, t=t)
        return nn.functional.mse_loss(net(t, sample.x_t), sample.dx_t)

    compare(ConditionalFlowMatching(path), event, dtype, theirs)


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_flow_matching_of_a_diffusion(event):
    """Its time runs on to the data, where the velocity is infinite. In float32 its 1 - exp(-B) has lost the digits."""
    peer, speed = flow_matching("VP"), 1 - 1e-3

    def theirs(net, noise, x, t):
        sample = peer.sample(x_0=noise, x_1=x, t=speed * t)
        return nn.functional.mse_loss(net(t, sample.x_t), speed * sample.dx_t)

    compare(ConditionalFlowMatching(VariancePreservingPath(epsilon=1e-3)), event, torch.float64, theirs)


def torchcfm():
    return pytest.importorskip("torchcfm", reason="needs the package torchcfm, which .ci/run installs")


def loss_of(matcher):
    """As in its examples: the mean of (v - u_t)^2."""

    def theirs(net, noise, x, t):
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(noise, x, t)
        return torch.mean((net(t, x_t) - u_t) ** 2)

    return theirs


@each_case
@pytest.mark.parametrize("name", ["ConditionalFlowMatcher", "VariancePreservingConditionalFlowMatcher"])
def test_torchcfm(name, event, dtype):
    matcher = getattr(torchcfm(), name)(sigma=0.0)
    path = LinearPath() if name == "ConditionalFlowMatcher" else TrigonometricPath()
    compare(ConditionalFlowMatching(path), event, dtype, loss_of(matcher))


@each_case
def test_torchcfm_with_noise_left(event, dtype):
    """Its matcher draws the noise itself."""
    matcher = torchcfm().TargetConditionalFlowMatcher(sigma=0.1)

    def theirs(net, noise, x, t):
        matcher.sample_noise_like = lambda _: noise
        return loss_of(matcher)(net, noise, x, t)

    compare(ConditionalFlowMatching(LinearPath(0.1)), event, dtype, theirs)


@each_case
def test_torchcfm_optimal_transport(event, dtype):
    """Its plan is the same assignment, of which it draws pairs with replacement: the pairs themselves are compared."""
    torchcfm()
    from torchcfm.optimal_transport import OTPlanSampler

    noise, x, _ = draws(event, dtype)
    plan = OTPlanSampler(method="exact").get_map(noise, x)
    theirs = noise[torch.as_tensor(plan).argmax(dim=0)]
    assert torch.equal(OptimalTransportCoupling()(noise, x), theirs)

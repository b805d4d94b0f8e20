"""Conditional flow matching: its value, its minimiser, its noise, and what it refuses."""

import pytest
import torch
from torch import Generator, nn

from divflow.divergence import FieldError
from divflow.flow import ContinuousFlow
from divflow.matching import (
    ConditionalFlowMatching,
    IndependentCoupling,
    LinearPath,
    LogitNormalTimes,
    MatchingError,
    OptimalTransportCoupling,
    TrigonometricPath,
    UniformTimes,
    VariancePreservingPath,
)
from divflow.solver import Solver

PATHS = [LinearPath(), LinearPath(0.2), TrigonometricPath(), VariancePreservingPath()]
OBJECTIVES = [ConditionalFlowMatching(path=path) for path in PATHS] + [
    ConditionalFlowMatching(coupling=OptimalTransportCoupling(), times=LogitNormalTimes()),
    ConditionalFlowMatching(times=UniformTimes(stratified=False)),
]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)


class GaussianVelocity(nn.Module):
    """The mean of the paths' velocities through x, for data N(mean, std^2) in each entry, independent of the noise."""

    def __init__(self, path, mean=1.0, std=0.5):
        super().__init__()
        self.path = path
        self.mean, self.std = (nn.Parameter(torch.tensor(value).double()) for value in (mean, std))

    def forward(self, t, x):
        t = t.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma, alpha_slope, sigma_slope = self.path.coefficients(t)
        # Both are normal, so the mean of the velocity given x is linear in x: covariance over variance.
        covariance = alpha * alpha_slope * self.std**2 + sigma * sigma_slope
        variance = alpha**2 * self.std**2 + sigma**2
        return alpha_slope * self.mean + covariance / variance * (x - alpha * self.mean)


def velocity(t, x):
    return torch.sin(t.reshape(-1, *[1] * (x.ndim - 1)) + x)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_gradient_vanishes_at_the_known_velocity_of_a_gaussian(path):
    generator = Generator().manual_seed(0)
    objective = ConditionalFlowMatching(path)

    def gradients(net):
        found = []
        for _ in range(200):
            x = 1 + 0.5 * torch.randn(100, 2, generator=generator, dtype=torch.float64)
            net.zero_grad()
            objective(net, x, generator).mean().backward()
            found.append(torch.stack([net.mean.grad, net.std.grad]))
        found = torch.stack(found)
        return found.mean(dim=0) / (found.std(dim=0) / len(found) ** 0.5)  # in standard errors

    assert (gradients(GaussianVelocity(path)).abs() < 4).all()
    assert (gradients(GaussianVelocity(path, mean=1.1, std=0.6)).abs() > 6).all()


@pytest.mark.parametrize("path", [LinearPath(), TrigonometricPath()], ids=str)
def test_the_flow_of_the_known_velocity_has_the_density_of_the_data(path):
    """Noise at t = 0 and data at t = 1, as flows have them."""
    flow = ContinuousFlow(GaussianVelocity(path), (2,), solver=Solver(rtol=1e-8, atol=1e-8)).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    truth = torch.distributions.Normal(1.0, 0.5).log_prob(x).sum(dim=1)
    torch.testing.assert_close(flow.log_prob(x), truth, rtol=1e-5, atol=1e-5)


@each_objective
def test_a_loss_is_the_mean_over_the_entries_of_its_sample(objective):
    x, noise = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    t = torch.rand(6, dtype=torch.float64)
    losses = objective(velocity, x, t=t, noise=noise)
    paired = objective.coupling(noise, x)
    for i in range(6):
        point = objective.path(t[i], paired[i : i + 1], x[i : i + 1])
        difference = (velocity(t[i : i + 1], point.x) - point.velocity).flatten().tolist()
        assert losses[i].item() == pytest.approx(sum(d * d for d in difference) / 6)


@each_objective
def test_images_equal_flattened_vectors(objective):
    images = torch.randn(8, 3, 2, 2)
    flat = objective(velocity, images.flatten(1), Generator().manual_seed(1))
    torch.testing.assert_close(objective(velocity, images, Generator().manual_seed(1)), flat)


@each_objective
def test_the_loss_is_a_function_of_its_generator_alone(objective):
    x = torch.randn(8, 2)
    before = torch.get_rng_state()
    first, again, other = (objective(velocity, x, Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(7)
    first = objective(velocity, x)
    torch.manual_seed(7)
    assert torch.equal(first, objective(velocity, x))


@pytest.mark.parametrize("coupling", [IndependentCoupling(), OptimalTransportCoupling()], ids=str)
def test_context_stays_with_its_datum(coupling):
    """A velocity that takes the datum as context knows the path exactly, (x_1 - x_t) / (1 - t); given another datum, it does not."""

    def informed(t, x, context):
        return (context - x) / (1 - t)[:, None]

    x = torch.randn(12, 2, dtype=torch.float64)[torch.arange(12) // 3]  # some data, and so some contexts, are alike
    t = 0.9 * torch.rand(12, dtype=torch.float64)
    objective = ConditionalFlowMatching(coupling=coupling)
    torch.testing.assert_close(objective(informed, x, context=x, t=t), torch.zeros(12).double())
    assert objective(informed, x, context=x.roll(3, 0), t=t).min() > 1e-3


def test_noise_of_a_context_is_as_it_is_sampled():
    """Without regard to the context optimal transport gives data on the right the noise on the right."""
    x = torch.randn(64, 1)
    context, noise = (x > 0).float(), torch.randn(64, 1)
    coupling = OptimalTransportCoupling()
    right = context.squeeze(1) > 0
    torch.testing.assert_close(coupling(noise, x, context)[right].mean(), noise[right].mean())
    assert coupling(noise, x)[right].mean() > 0.5


def test_optimal_transport_leaves_less_variance_to_the_velocity():
    """The loss at the minimum is that variance; on a line, all but nothing is left of it."""
    x = torch.randn(1_000, 1)
    losses = [
        ConditionalFlowMatching(coupling=coupling)(lambda t, x: torch.zeros_like(x), x).mean()
        for coupling in (IndependentCoupling(), OptimalTransportCoupling(max_rows=1_000))
    ]
    assert losses[0] == pytest.approx(2, abs=0.2)  # the variance of x_1 - x_0
    assert losses[1] < 0.05


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_losses_are_summed_in_float32_at_least(dtype, expected):
    losses = ConditionalFlowMatching()(velocity, torch.randn(3, 2, dtype=dtype))
    assert losses.dtype == expected


def test_events_and_batches_without_entries():
    for coupling in (IndependentCoupling(), OptimalTransportCoupling()):
        objective = ConditionalFlowMatching(coupling=coupling)
        assert objective(velocity, torch.zeros(0, 3)).shape == (0,)
        assert objective(velocity, torch.randn(4)).shape == (4,)
        assert torch.equal(objective(velocity, torch.zeros(4, 0)), torch.zeros(4))
        assert objective(velocity, torch.randn(1, 2)).shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t": 1.5}, MatchingError, r"t must lie in \[0, 1\].*from 1.5 to 1.5"),
        ({"t": torch.tensor([0.1, -0.2, 0.3])}, MatchingError, "from -0.2 to 0.3"),
        ({"t": torch.tensor([0.1, float("nan"), 0.3])}, MatchingError, "reaches from nan"),
        ({"t": torch.rand(2)}, FieldError, r"one time per sample \(3,\), but has shape \(2,\)"),
        ({"noise": torch.randn(2, 2)}, FieldError, r"noise must have x's shape.*\(3, 2\).*has \(2, 2\)"),
        ({"noise": torch.randn(3, 2).double()}, FieldError, "torch.float32.*torch.float64"),
        ({"context": torch.randn(2, 1)}, FieldError, r"context needs one row per sample, \(3, ...\)"),
        ({"generator": 0}, TypeError, "torch.Generator or None, but is 0"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ConditionalFlowMatching()(velocity, torch.randn(3, 2), **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t, x: x[:, :1], r"returned shape \(3, 1\) for x of shape \(3, 2\)"),
        (lambda t, x: x.sum(), r"returned shape \(\)"),
        (lambda t, x: (x, t), "returned a tuple"),
        (lambda t, x: x.double(), "torch.float64 for x of torch.float32"),
    ],
)
def test_values_that_are_no_velocity(wrong, message):
    with pytest.raises(FieldError, match=message):
        ConditionalFlowMatching()(wrong, torch.randn(3, 2))


@pytest.mark.parametrize("x", [torch.arange(3), torch.tensor(1.0), [1.0]])
def test_data_that_are_none(x):
    with pytest.raises(FieldError, match="x must"):
        ConditionalFlowMatching()(velocity, x)


@pytest.mark.parametrize("name", ["path", "coupling", "times"])
def test_parts_that_are_none(name):
    with pytest.raises(ValueError, match=f"{name} must be an instance of {name.title()}, but is 'linear'"):
        ConditionalFlowMatching(**{name: "linear"})


class ScalarTime(nn.Module):
    """A velocity that joins one time to all rows, as many are written."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, t, x):
        return self.net(torch.cat([x, torch.ones(len(x), 1) * t], dim=1))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("wrong", [ScalarTime(), lambda t, x: t * x], ids=["raises", "broadcasts"])
def test_scalar_times_only_are_refused(wrong, count):
    """Also where the number of samples is that of the columns, to which t is broadcast without an error."""
    with pytest.raises(FieldError, match=r"a time for each sample.*t\.reshape\(-1, 1\)"):
        ConditionalFlowMatching().check(wrong, torch.randn(count, 2))


def test_check_takes_what_training_takes():
    objective = ConditionalFlowMatching()
    for count in (0, 1, 2, 5):
        x = torch.randn(count, 2)
        objective.check(velocity, x)
        objective.check(lambda t, x, context: velocity(t, x) * context, x, torch.rand(count, 1))
    with pytest.raises(FieldError, match="mixes the samples"):
        objective.check(lambda t, x: x - x.mean(dim=0), torch.randn(4, 2))
    with pytest.raises(FieldError, match="context needs one row"):
        objective.check(velocity, torch.randn(3, 2), torch.rand(2, 1))

"""The probability-flow ODE of Gaussian data against its closed form, and the parts that make a flow of a score."""

import math

import pytest
import torch
from covering import alternated
from gaussian_scores import Gaussian
from test_sde import OrnsteinUhlenbeck
from torch import nn

from divflow.divergence import Exact, FieldError, Hutchinson
from divflow.likelihood import Augmented, Quadrature
from divflow.networks import MLP, ConvNet
from divflow.score import (
    ScaledScore,
    SDEError,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    probability_flow,
)
from divflow.solver import Solver

TIGHT = Solver("dopri8", rtol=1e-9, atol=1e-9)
CLOSE = Solver("dopri8", rtol=1e-8, atol=1e-8)
EVENTS = [(3,), (3, 2, 2)]
SDES = {
    "vp": lambda event: VariancePreserving(event_shape=event),
    "ve": lambda event: VarianceExploding(0.1, 10.0, event_shape=event),
    "subvp": lambda event: SubVariancePreserving(event_shape=event),
    "own": lambda event: OrnsteinUhlenbeck(event_shape=event, T=1.5),
}


def carried(data, sde, x, start, stop):
    """The states at `stop` and log |det| of the map there, in closed form: the covariances at all times commute."""
    values, basis = torch.linalg.eigh(data.covariance)
    (alpha_0, sigma_0), (alpha_1, sigma_1) = (sde.marginal(torch.tensor(t, dtype=x.dtype)) for t in (start, stop))
    ratio = ((alpha_1**2 * values + sigma_1**2) / (alpha_0**2 * values + sigma_0**2)).sqrt()
    centred = (x.flatten(1) - alpha_0 * data.mean) @ basis * ratio @ basis.T
    return (centred + alpha_1 * data.mean).view_as(x), ratio.log().sum()


@alternated(name=SDES, event=EVENTS)
def test_gaussian_in_closed_form(name, event):
    data, sde = Gaussian(event), SDES[name](event)
    flow = probability_flow(
        data.score(sde), sde, solver=CLOSE, likelihood=Quadrature(31, tolerance=1e-6), estimator=Exact()
    ).double()
    x = data.sample(4)
    result = flow.evaluate(x)
    latent, log_det = carried(data, sde, x, sde.epsilon, sde.T)
    torch.testing.assert_close(result.latent, latent, rtol=0, atol=1e-5)
    expected = sde.prior.log_prob(latent) + log_det
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-5)
    assert result.quadrature_error.max() < 1e-6
    decoded, _ = carried(data, sde, latent, sde.T, sde.epsilon)
    torch.testing.assert_close(flow.decode(latent), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_density_is_that_of_the_data(name):
    """Up to what the prior leaves out at T, and the noise at epsilon."""
    data = Gaussian((3,))
    sde = SDES[name]((3,))
    x = data.sample(50)
    log_prob = probability_flow(data.score(sde), sde, solver=Solver(rtol=1e-7, atol=1e-7)).double().log_prob(x)
    truth = torch.distributions.MultivariateNormal(data.mean, data.covariance).log_prob(x)
    assert (log_prob - truth).abs().max() < 0.05
    assert abs((log_prob - truth).mean()) < 0.01


def test_augmented_and_estimated_agree_with_quadrature():
    data = Gaussian((3,))
    sde = VariancePreserving(event_shape=3)
    flow = probability_flow(data.score(sde), sde, solver=Solver(rtol=1e-8, atol=1e-8)).double()
    x = data.sample(3)
    reference = flow.log_prob(x).detach()
    torch.testing.assert_close(flow.replace(likelihood=Augmented()).log_prob(x), reference, rtol=0, atol=1e-5)
    estimated = flow.replace(estimator=Hutchinson(200), likelihood=Quadrature(31)).evaluate(
        x, generator=torch.Generator().manual_seed(0)
    )
    assert ((estimated.log_prob - reference).abs() < 5 * estimated.standard_error + 1e-3).all()


def test_tolerance_divides_the_stiff_end():
    """Data of standard deviation 0.01: their density changes within t < 0.001, a thousandth of the interval."""
    sde = VariancePreserving(event_shape=1)

    def score(t, x):
        alpha, sigma = sde.mean_scale(t), sde.std(t)
        return -x / (alpha**2 * 1e-4 + sigma**2).reshape(-1, 1)

    x = torch.tensor([[0.01]], dtype=torch.float64)
    alpha, sigma = sde.marginal(torch.tensor(sde.epsilon, dtype=torch.float64))
    expected = torch.distributions.Normal(0.0, (alpha**2 * 1e-4 + sigma**2).sqrt()).log_prob(x)[:, 0]
    solver = Solver("dopri8", rtol=1e-9, atol=1e-9)
    whole = probability_flow(score, sde, likelihood=Quadrature(15), solver=solver).double().evaluate(x)
    split = probability_flow(score, sde, likelihood=Quadrature(15, tolerance=1e-4), solver=solver).double().evaluate(x)
    assert (whole.log_prob - expected).abs() > 0.1
    assert whole.quadrature_error > 0.1
    assert split.quadrature_error < 1e-4
    torch.testing.assert_close(split.log_prob, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SDES)
def test_exact_divergence_takes_the_cheap_ways_through_the_scaling(name):
    """The layered and the coloured method see through ScaledScore and the flow, and are right."""
    sde = SDES[name](5)
    flow = probability_flow(ScaledScore(MLP(5, hidden=(8, 8)).double(), sde), sde)
    x = torch.randn(4, 5, dtype=torch.float64)
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)):
        assert Exact().explain(flow.velocity, t, x).method == "layered"
        torch.testing.assert_close(
            Exact()(flow.velocity, t, x).divergence, Exact("reverse")(flow.velocity, t, x).divergence
        )
    image = SDES[name]((1, 12, 12))
    velocity = probability_flow(ScaledScore(ConvNet((1, 12, 12), hidden=(4,)), image), image).velocity
    assert Exact().explain(velocity, 0.3, torch.randn(2, 1, 12, 12)).method == "colored"


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_a_scaled_network_of_zeros_is_a_normal_density(event):
    sde = VariancePreserving(event_shape=event)
    network = MLP(event, hidden=(4,), zero_init=True).double()
    x, t = torch.randn(5, *event, dtype=torch.float64), torch.linspace(0.01, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(ScaledScore(network, sde)(t, x), -x)  # alpha^2 + sigma^2 = 1
    log_prob = probability_flow(ScaledScore(network, sde), sde, solver=TIGHT).double().log_prob(x)
    torch.testing.assert_close(
        log_prob, torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(1), atol=2e-3, rtol=0
    )
    alpha, sigma = (value.reshape(-1, *[1] * len(event)) for value in sde.marginal(t))
    wide = ScaledScore(network, sde, data_std=2.0)(t, x)
    torch.testing.assert_close(wide, -x / (4 * alpha**2 + sigma**2))


@pytest.mark.parametrize("name", SDES)
def test_scalings_are_their_formulas(name):
    """Karras et al. 2022, table 1: D(x) = c_skip x + c_out F(c_in x; c_noise), and the score is (D(x) - x) / sigma^2.

    It is written for alpha = 1: of x / alpha, with noise of sigma / alpha, whose score is alpha times that of x.
    """
    sde, network, c = SDES[name](3), MLP(3, hidden=(4,)).double(), 0.7
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.linspace(0.01, 1, 5, dtype=torch.float64)
    alpha, std = (value[:, None] for value in sde.marginal(t))
    torch.testing.assert_close(ScaledScore(network, sde, data_std=None)(t, x), network(t, x) / std)
    y, sigma = x / alpha, std / alpha
    denoiser = c**2 / (sigma**2 + c**2) * y + sigma * c / (sigma**2 + c**2).sqrt() * network(
        sigma[:, 0].log() / 4, y / (sigma**2 + c**2).sqrt()
    )
    torch.testing.assert_close(ScaledScore(network, sde, data_std=c)(t, x), (denoiser - y) / sigma**2 / alpha)


def test_a_network_of_ones_own_without_time():
    sde = VariancePreserving(event_shape=2)
    flow = probability_flow(nn.Linear(2, 2), sde)
    assert flow.log_prob(torch.zeros(3, 2)).shape == (3,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: probability_flow(lambda t, x: -x, VariancePreserving()), SDEError, "no event shape"),
        (
            lambda: probability_flow(lambda t, x: x[:, :1], VariancePreserving(event_shape=2)).log_prob(
                torch.ones(3, 2)
            ),
            FieldError,
            r"\(3, 1\).*\(3, 2\)",
        ),
        (lambda: ScaledScore(MLP(2), VariancePreserving(), data_std=0.0), SDEError, r"data_std.*0\.0"),
        (
            lambda: probability_flow(lambda t, x: -x, VariancePreserving(event_shape=2)).log_prob(torch.ones(3, 3)),
            FieldError,
            r"\(2,\).*\(3, 3\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_prior_is_the_flows_base():
    sde = VarianceExploding(0.01, 20.0, event_shape=(2, 2))
    flow = probability_flow(lambda t, x: -x / 400, sde)
    assert flow.times() == pytest.approx((sde.T, sde.epsilon))
    z = torch.randn(3, 2, 2)
    expected = -(z / 20).square().flatten(1).sum(1) / 2 - 4 * math.log(20 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(flow.base.log_prob(z), expected)

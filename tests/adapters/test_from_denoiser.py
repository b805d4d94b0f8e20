"""Denoisers D(x, sigma): log p of a mixture with noise of sigma_min in closed form, and what of it has no variance."""

import math

import pytest
import torch
from covering import alternated
from gaussian_mixtures import Mixture, over
from torch import Generator

from divflow.adapters import AdapterError, from_denoiser
from divflow.divergence import Exact, Hutchinson, HutchPlusPlus, XTrace
from divflow.likelihood import Augmented, Quadrature
from divflow.networks import MLP

EVENTS = [(2,), (1, 4, 4)]


def denoiser(data):
    def model(x, sigma, shift=None):
        shift = torch.zeros((), dtype=x.dtype) if shift is None else over(shift, x)
        return data.predictions(x - shift, torch.ones_like(sigma), sigma)[0] + shift

    return model


@alternated(event=EVENTS, data_std=[0.0, 1.0])
def test_log_prob_of_a_mixture(event, data_std):
    data = Mixture(event)
    x = data.sample(6)
    for sigma_min in (0.002, 0.5):
        result = from_denoiser(denoiser(data), event, sigma_min, 1000.0, data_std=data_std).evaluate(x)
        torch.testing.assert_close(result.log_prob, data.log_prob(x, sigma_min), rtol=0, atol=1e-3)
        assert result.quadrature_error.max() < 1e-3


def test_known_scale_of_the_data_is_in_the_base():
    """Normal data of standard deviation 2: what is left of them at sigma_max = 3 is then in the base."""
    x, sigma_min = 2 * torch.randn(4, 3, dtype=torch.float64), 0.5
    expected = torch.distributions.Normal(0.0, math.hypot(2, sigma_min)).log_prob(x).sum(dim=1)
    known, unknown = (
        from_denoiser(lambda x, s: x / (1 + over(s, x) ** 2 / 4), 3, sigma_min, 3.0, data_std=data_std).log_prob(x)
        for data_std in (2.0, 0.0)
    )
    torch.testing.assert_close(known, expected, rtol=0, atol=1e-5)
    assert (unknown - expected).abs().max() > 0.1


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_context_shifts_the_data(event):
    data, shift = Mixture(event), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = data.sample(3)
    for name in (None, "shift"):
        flow = from_denoiser(denoiser(data), event, 0.01, 1e5, context_name=name)
        torch.testing.assert_close(flow.log_prob(x + over(shift, x), shift), data.log_prob(x, 0.01), rtol=0, atol=1e-3)


def test_samples_are_noisy_data():
    data = Mixture((2,))
    flow = from_denoiser(denoiser(data), 2, 0.01, 80.0).double()
    samples = flow.sample(400, generator=Generator().manual_seed(0))
    expected, error = -data.log_prob(data.sample(20_000)), data.log_prob(samples).std() / 20
    assert abs(-data.log_prob(samples).mean() - expected.mean()) < 4 * error


@alternated(
    likelihood=[Quadrature(tolerance=1e-4), Augmented()],
    estimator=[Hutchinson(1), Hutchinson(1, "sphere"), XTrace(4)],
)
def test_the_linear_part_has_no_variance(likelihood, estimator):
    """All data at one point m: D = m, and the density is N(m, sigma_min^2 I), whatever the probes."""
    m = torch.randn(6, dtype=torch.float64)
    x = m + torch.randn(3, 6, dtype=torch.float64)
    flow = from_denoiser(lambda x, sigma: m.expand_as(x), 6, 0.5, 1e5, estimator=estimator, likelihood=likelihood)
    expected = torch.distributions.Normal(m, 0.5).log_prob(x).sum(dim=1)
    first, second = (flow.log_prob(x, generator=Generator().manual_seed(seed)) for seed in range(2))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", [Hutchinson(1, "gaussian"), HutchPlusPlus(4), XTrace(4)], ids=repr)
def test_normal_data_of_the_known_scale_have_no_variance(estimator):
    """D = c^2 / (c^2 + sigma^2) x: the scaled data rest, and their divergence is zero whatever the probes."""
    x = torch.randn(3, 6, dtype=torch.float64)
    flow = from_denoiser(lambda x, s: x * 4 / (4 + over(s, x) ** 2), 6, 0.5, 80.0, data_std=2.0, estimator=estimator)
    torch.testing.assert_close(flow.encode(x), x)
    expected = torch.distributions.Normal(0.0, math.hypot(2, 0.5)).log_prob(x).sum(dim=1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-6)


def test_standard_error_is_the_spread_of_estimates():
    data = Mixture((16,))
    x = data.sample(1).expand(400, 16)
    flow = from_denoiser(denoiser(data), 16, 0.05, 100.0, estimator=Hutchinson(8), likelihood=Quadrature(15))
    result = flow.evaluate(x, generator=Generator().manual_seed(0), diagnostics=False)
    exact = flow.replace(estimator=Exact()).log_prob(x[:1])
    spread = result.log_prob.std()
    assert result.standard_error.square().mean().sqrt() == pytest.approx(spread.item(), rel=0.15)
    assert abs(result.log_prob.mean() - exact) < 4 * spread / 20


def test_exact_divergence_takes_the_cheap_way():
    """Through scaling, noise level and adapter, the closed form of the network is found."""
    network = MLP(8, hidden=(16, 16)).double()
    flow = from_denoiser(lambda x, sigma: network(sigma.log(), x), 8, 0.01, 80.0)
    x = torch.randn(4, 8, dtype=torch.float64)
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)):
        assert Exact().explain(flow.velocity, t, x).method == "layered"
        torch.testing.assert_close(
            Exact()(flow.velocity, t, x).divergence, Exact("reverse")(flow.velocity, t, x).divergence
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1.0), r"sigma_min=1\.0"),
        ((0.0, 1.0), r"sigma_min=0\.0"),
        ((-1.0, 1.0), r"sigma_min=-1\.0"),
        ((2.0, 1.0), r"sigma_min=2\.0.*sigma_max=1\.0"),
        ((0.1, math.inf), "sigma_max=inf"),
        ((math.nan, 1.0), "sigma_min=nan"),
        (("0.1", 1.0), "sigma_min='0.1'"),
    ],
)
def test_noise_levels_are_checked(arguments, message):
    with pytest.raises(AdapterError, match=message):
        from_denoiser(lambda x, sigma: x, 2, *arguments)


@pytest.mark.parametrize("data_std", [-1.0, math.nan, math.inf, "1"])
def test_scale_of_the_data_is_checked(data_std):
    with pytest.raises(AdapterError, match="data_std"):
        from_denoiser(lambda x, sigma: x, 2, 0.1, 1.0, data_std=data_std)


def test_noise_levels_of_others_are_refused():
    flow = from_denoiser(lambda x, sigma: x / 2, 2, 0.1, 10.0)
    with pytest.raises(AdapterError, match=r"\[-2\.30259, 2\.30259\].*evaluated at 2\."):
        flow.trajectory(torch.zeros(1, 2), [0.0, 3.0])

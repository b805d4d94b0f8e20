"""Likelihoods of discrete data: bounds of probabilities that are known, and where their errors come from."""

import math

import pytest
import torch
from closed_forms import LinearVelocity
from torch.distributions import Independent, Normal

from divflow.data import Affine, DiscreteImages, Toy, TruncatedNormalDequantization, UniformDequantization, toy
from divflow.divergence import Hutchinson
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.likelihood import Quadrature
from divflow.tasks.likelihood_values import likelihood_values

BASE = Normal(torch.tensor(0.4), torch.tensor(0.25))
KINDS = {"uniform": UniformDequantization(), "truncated normal": TruncatedNormalDequantization(0.3)}


def normal_density(event=(1, 2, 1)):
    """Independent normals in the cube: the probability of a value is a difference of distribution functions."""
    base = Independent(Normal(BASE.loc.expand(event), BASE.scale.expand(event)), len(event))
    return FlowDensity(ContinuousFlow(lambda t, x: 0 * x, event, base=base), Affine())


def data_of(values, dequantization=None, levels=4):
    return DiscreteImages(values, levels, dequantization=dequantization)


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("uniform", marks=pytest.mark.slow), "truncated normal"])
def test_the_bounds_come_down_to_the_probability(kind):
    data = data_of(torch.randint(4, (4_000, 1, 2, 1)), KINDS[kind])
    x = data.test.rows
    low = (4 * x).floor() / 4
    truth = -(BASE.cdf(low + 0.25) - BASE.cdf(low)).log2().mean(dim=(1, 2, 3))
    density = normal_density()
    one = likelihood_values(density, x, data)
    assert "bits_per_dim_importance_weighted" not in one
    several = likelihood_values(density, x, data, 8)
    many = likelihood_values(density, x, data, 200)
    means = [one["bits_per_dim"].mean(), *(v["bits_per_dim_importance_weighted"].mean() for v in (several, many))]
    error = (several["dequantization_variance"].mean() / 400).sqrt()
    assert means[0] > means[1] + error
    assert means[1] > truth.mean() - 5 * error
    torch.testing.assert_close(means[2], truth.mean(), rtol=0, atol=5e-3)
    torch.testing.assert_close(many["bits_per_dim"].mean(), means[0], rtol=0, atol=0.15)
    assert many["nfe"][0] == one["nfe"][0]


@torch.no_grad()
def test_bits_of_one_draw_are_those_of_its_log_density():
    data = data_of(torch.randint(4, (100, 1, 2, 1)))
    values = likelihood_values(normal_density(), data.test.rows, data)
    torch.testing.assert_close(values["bits_per_dim"], values["nll"] / (2 * math.log(2)) + 2)
    assert values["gap"] is None


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_noise_and_probes_are_held_apart(kind):
    """All images alike: what varies between them is noise and probes, and each is reported as large as it is."""
    torch.manual_seed(1)
    data = data_of(torch.ones(30_000, 2, 1, 1, dtype=torch.uint8), KINDS[kind])
    x, unit = data.train.__getitems__(list(range(4_000))), 2 * math.log(2)
    flow = ContinuousFlow(LinearVelocity((2, 1, 1), torch.float32), (2, 1, 1), likelihood=Quadrature(3))
    probes = Hutchinson(2, "gaussian")
    exact = likelihood_values(FlowDensity(flow, Affine()), x, data, 3)
    with pytest.warns(UserWarning, match=r"Hutchinson.*estimates.*estimator@evaluation.estimator=exact"):
        estimated = likelihood_values(FlowDensity(flow.replace(estimator=probes), Affine()), x, data, 3)
    assert "bits_per_dim_importance_weighted" not in estimated
    assert exact["estimator_variance"].abs().max() == 0
    for values in (exact, estimated):
        parts = values["dequantization_variance"].mean() + values["estimator_variance"].mean()
        torch.testing.assert_close((unit * values["bits_per_dim"]).var(), parts, rtol=0.1, atol=0)
    noise = exact["dequantization_variance"].mean()
    torch.testing.assert_close(estimated["dequantization_variance"].mean(), noise, rtol=0.25, atol=0)
    assert estimated["estimator_variance"].mean() > 0.2 * noise  # there is something to hold apart


@torch.no_grad()
def test_what_can_not_be_held_apart_is_not_claimed():
    data = data_of(torch.randint(4, (100, 1, 2, 1)))
    density = normal_density()
    one_probe = density.with_flow(density.flow.replace(estimator=Hutchinson(1)))
    with pytest.warns(UserWarning, match="importance-weighted"):
        values = likelihood_values(one_probe, data.test.rows, data, 3)
    assert values["estimator_variance"] is None
    assert "dequantization_variance" not in values


@torch.no_grad()
def test_continuous_data_have_no_draws():
    data = Toy(toy.two_moons(), 4, 4, 4)
    density = FlowDensity(ContinuousFlow(lambda t, x: 0 * x, 2), Affine())
    values = likelihood_values(density, data.test.rows, data, 5)
    assert values["bits_per_dim"] is None
    torch.testing.assert_close(values["gap"], data.log_prob(data.test.rows) + values["nll"])

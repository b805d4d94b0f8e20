"""Importance weights against targets whose normalization and moments are known."""

import math

import pytest
import torch
from closed_forms import LinearVelocity, carried_normal
from torch import Generator
from torch.distributions import MultivariateNormal

from divflow.divergence import Autograd, ControlVariate, Exact, Hutchinson, HutchPlusPlus, XTrace
from divflow.flow import ContinuousFlow
from divflow.flow.importance import ImportanceError
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Solver

N = 4_000


def linear(event=(2,)):
    velocity = LinearVelocity(event)
    flow = ContinuousFlow(velocity, event, solver=Solver("dopri5", rtol=1e-8, atol=1e-8)).double()
    return flow, carried_normal(velocity, 0.0, 1.0)


def target(truth, log_z=3.0):
    """A normal a little off the flow's own, times e^3."""
    normal = MultivariateNormal(truth.loc + 0.3, 0.8 * truth.covariance_matrix)
    return normal, lambda x: normal.log_prob(x.flatten(1)) + log_z


@torch.no_grad()
@pytest.mark.parametrize("event", [(2,), (1, 2, 1)], ids=str)
def test_normalization_and_moments_of_a_known_target(event):
    flow, truth = linear(event)
    normal, log_target = target(truth)
    found = flow.importance_weights(log_target, N, Generator().manual_seed(0))
    assert found.samples.shape == (N, *event)
    weights = found.log_weights.exp()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert 1 < found.effective_sample_size < N
    assert 0 < found.standard_error < 0.05
    assert abs(found.log_normalizer - 3.0) < 5 * found.standard_error
    mean = weights @ found.samples.flatten(1)
    error = normal.covariance_matrix.diagonal().sqrt() / found.effective_sample_size.sqrt()
    assert ((mean - normal.loc).abs() < 5 * error).all()
    assert not ((mean - truth.loc).abs() < 5 * error).all()


@torch.no_grad()
def test_the_standard_error_is_the_spread_of_repeated_estimates():
    flow, truth = linear()
    _, log_target = target(truth)
    runs = [flow.importance_weights(log_target, 200, Generator().manual_seed(seed)) for seed in range(60)]
    spread = torch.stack([run.log_normalizer for run in runs]).std()
    claimed = torch.stack([run.standard_error for run in runs]).mean()
    assert 0.7 < spread / claimed < 1.4
    ratios = torch.stack([run.effective_sample_size for run in runs]) / 200
    assert ratios.std() < 0.1


@torch.no_grad()
def test_samples_of_several_solves_are_weighted_together():
    flow, truth = linear()
    _, log_target = target(truth)
    found = flow.importance_weights(log_target, 100, Generator().manual_seed(0), batch_size=30)
    assert len(found.samples.unique(dim=0)) == 100
    log_weights = log_target(found.samples) - truth.log_prob(found.samples)
    expected = log_weights.log_softmax(dim=0)
    torch.testing.assert_close(found.log_weights, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_normalizer, log_weights.logsumexp(dim=0) - math.log(100), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.effective_sample_size, 1 / expected.exp().square().sum(), rtol=1e-4, atol=0)
    for size in (0, 2.5):
        with pytest.raises(ValueError, match=f"batch_size.*{size}"):
            flow.importance_weights(log_target, 100, batch_size=size)


@torch.no_grad()
def test_a_flow_that_is_the_target_has_equal_weights():
    flow, truth = linear()
    found = flow.importance_weights(lambda x: truth.log_prob(x) - 7.0, 50)
    torch.testing.assert_close(found.log_weights, torch.full((50,), -math.log(50)).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.effective_sample_size, torch.tensor(50.0).double())
    torch.testing.assert_close(found.log_normalizer, torch.tensor(-7.0).double(), rtol=0, atol=1e-5)
    assert found.standard_error < 1e-5


@torch.no_grad()
def test_a_large_constant_in_the_target_changes_only_log_z():
    flow = ContinuousFlow(lambda t, x: 0 * x, 2)
    found = flow.importance_weights(lambda x: -x.square().sum(dim=1) - 1e6, 10_000, Generator().manual_seed(0))
    assert found.log_weights.exp().sum() == pytest.approx(1.0, abs=1e-5)
    assert found.log_normalizer == pytest.approx(-1e6 + math.log(math.pi), abs=0.1)


@torch.no_grad()
def test_a_target_of_bounded_support():
    """The share of a standard normal in the right half plane is a half; a flow that is the normal itself."""
    flow = ContinuousFlow(lambda t, x: 0 * x, 2)
    found = flow.importance_weights(
        lambda x: torch.where(x[:, 0] > 0, flow.base.log_prob(x), -math.inf), N, Generator().manual_seed(0)
    )
    assert abs(found.log_normalizer + math.log(2)) < 5 * found.standard_error
    torch.testing.assert_close(found.effective_sample_size / N, torch.tensor(0.5), rtol=0, atol=0.05)
    assert (found.samples[found.log_weights.isfinite(), 0] > 0).all()


def test_the_bound_is_differentiable_in_the_flow():
    flow, truth = linear()
    flow.importance_weights(target(truth)[1], 20).log_normalizer.backward()
    assert flow.velocity.A.grad.abs().sum() > 0


def test_a_conditional_flow_takes_a_row_a_sample():
    flow = ContinuousFlow(lambda t, x, context: 0 * x + context, 1)
    context = torch.arange(6.0)[:, None]
    found = flow.importance_weights(lambda x: -((x - context) ** 2).sum(dim=1) / 2, 6, context=context)
    torch.testing.assert_close(
        found.log_normalizer.detach(), torch.tensor(math.log(2 * math.pi) / 2), rtol=0, atol=1e-4
    )
    with pytest.raises(ImportanceError, match=r"each of 5 samples, but the context has shape \(6, 1\)"):
        flow.importance_weights(lambda x: x[:, 0], 5, context=context)


@pytest.mark.parametrize(
    ("log_target", "message"),
    [
        (lambda x: x, r"\(4,\), but returned shape \(4, 2\)"),
        (lambda x: x[:, :1], r"returned shape \(4, 1\)"),
        (lambda x: x[:, 0] + 0j, "complex128"),
        (lambda x: x[:, 0] > 0, r"mask.*torch\.where\(mask, 0\.0"),
        (lambda x: 1.0, r"returned 1\.0"),
        (lambda x: x[:, 0] * math.nan, "NaN"),
        (lambda x: x[:, 0].abs() * math.inf, r"\+inf"),
        (lambda x: x[:, 0].abs() * -math.inf, "vanishes at all 4"),
    ],
)
def test_targets_that_give_no_weights(log_target, message):
    with pytest.raises(ImportanceError, match=message):
        linear()[0].importance_weights(log_target, 4)


def test_estimated_densities_and_single_samples_are_refused():
    flow, truth = linear()
    with pytest.raises(ImportanceError, match=r"Hutchinson.*1 / p.*replace"):
        flow.replace(estimator=Hutchinson(2)).importance_weights(truth.log_prob, 4)
    with pytest.raises(ValueError, match="num_samples.*2.*1"):
        flow.importance_weights(truth.log_prob, 1)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("likelihood", [Quadrature(7), Augmented()])
@pytest.mark.parametrize(
    "estimator", [Hutchinson(2), XTrace(4), HutchPlusPlus(5), ControlVariate(Hutchinson(2), 2)], ids=str
)
def test_frozen_estimators_are_no_exact_ones(estimator, likelihood, correct):
    """They give one number at every call, and that is wrong by what they drew."""
    flow = ContinuousFlow(LinearVelocity((6,)), 6, likelihood=likelihood).double()
    frozen = estimator.freeze(torch.zeros(4, 6, dtype=torch.float64), Generator().manual_seed(0))
    assert frozen.estimates
    assert not frozen.stochastic
    with pytest.raises(ImportanceError, match="has drawn its probes.*Exact"):
        flow.replace(estimator=frozen).importance_weights(lambda x: x[:, 0], 4, correct=correct)


def test_exact_estimators_are_none_of_probes():
    assert not any(estimator.freeze(torch.zeros(4, 2)).estimates for estimator in (Exact(), Autograd(), XTrace(4)))
    assert all(
        estimator.estimates for estimator in (Hutchinson(), HutchPlusPlus(3), XTrace(4), ControlVariate(Hutchinson()))
    )


@torch.no_grad()
def test_noise_of_probes_biases_weights_by_half_its_variance_and_is_corrected_for():
    """A flow that is the target, so that all spread of the weights is the probes'."""
    torch.manual_seed(0)
    flow = ContinuousFlow(LinearVelocity((12,)), 12, solver=Solver("rk4")).double()
    flow.velocity.A.mul_(1.5)
    truth = carried_normal(flow.velocity, 0.0, 1.0)
    noisy = flow.replace(estimator=Hutchinson(8))
    found = noisy.importance_weights(lambda x: truth.log_prob(x) + 3, N, Generator().manual_seed(0), correct=True)
    _, evaluation = noisy.rsample_and_evaluate(N, generator=Generator().manual_seed(0))
    variance = evaluation.standard_error.square().mean()
    assert variance > 0.1
    assert 0.9 < found.probe_share <= 1
    assert abs(found.log_normalizer - 3) < 4 * found.standard_error + variance**2 / 28
    uncorrected = (truth.log_prob(found.samples) + 3 - evaluation.log_prob).logsumexp(0) - math.log(N)
    assert uncorrected - 3 > variance / 2 - 4 * found.standard_error
    assert uncorrected - 3 > 8 * found.standard_error


@torch.no_grad()
@pytest.mark.parametrize("likelihood", [Quadrature(7), Augmented()])
def test_an_exact_divergence_has_no_share_in_the_weights_and_nothing_to_correct(likelihood):
    flow, truth = linear()
    flow = flow.replace(likelihood=likelihood)
    results = [
        flow.importance_weights(target(truth)[1], 20, Generator().manual_seed(0), correct=correct)
        for correct in (True, False)
    ]
    assert results[0].probe_share == results[1].probe_share == 0
    assert torch.equal(results[0].log_weights, results[1].log_weights)


def test_noise_that_is_not_known_can_not_be_corrected():
    flow, truth = linear()
    with pytest.raises(ImportanceError, match="does not know its error.*two probes"):
        flow.replace(estimator=Hutchinson(1)).importance_weights(truth.log_prob, 4, correct=True)

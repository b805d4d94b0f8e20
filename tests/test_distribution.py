"""A flow as a torch distribution: its laws, closed forms, and its place inside torch's and zuko's own."""

import math

import pytest
import torch
from closed_forms import LinearVelocity, carried_normal
from torch import nn
from torch.distributions import (
    Categorical,
    Distribution,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    constraints,
    kl_divergence,
)
from torch.distributions.transforms import AffineTransform, ExpTransform

from divflow.divergence import FieldError, Hutchinson
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow
from divflow.flow.distribution import FlowDistribution, estimate_kl
from divflow.solver import Solver

TIGHT = Solver("dopri5", rtol=1e-9, atol=1e-9)


class Shifted(nn.Module):
    """dx/dt = scale * context: a standard normal carried to one of mean scale * context."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t, x, context):
        return 0 * x + self.scale * context.reshape(len(x), -1).sum(dim=1).view(-1, *[1] * (x.ndim - 1))


def linear(event=(3,)):
    velocity = LinearVelocity(event)
    return ContinuousFlow(velocity, event, solver=TIGHT).double(), carried_normal(velocity, 0.0, 1.0)


def conditional(event=(2,)):
    return ContinuousFlow(Shifted(), event, solver=TIGHT).double()


def shifted_normal(sums):
    """The closed form of `conditional` for contexts of these sums `(*batch)`."""
    return Independent(Normal((2 * sums)[..., None].expand(*sums.shape, 2), torch.ones(2, dtype=torch.float64)), 1)


@pytest.mark.parametrize("event", [(3,), (1, 2, 2), ()], ids=str)
def test_shapes_and_log_density_of_the_flow(event):
    flow, truth = linear(event)
    distribution = flow.distribution()
    assert isinstance(distribution, Distribution)
    assert (distribution.batch_shape, distribution.event_shape) == ((), event)
    assert distribution.support.event_dim == len(event)
    for shape in ((), (4,), (2, 5)):
        x = distribution.sample(shape)
        assert x.shape == (*shape, *event)
        assert not x.requires_grad
        log_prob = distribution.log_prob(x)
        assert log_prob.shape == shape
        expected = truth.log_prob(x.reshape(*shape, max(1, math.prod(event))))
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(log_prob.flatten(), flow.log_prob(x.reshape(-1, *event) if shape else x[None]))


def test_no_samples_have_no_densities():
    distribution = ContinuousFlow(lambda t, x: -x, (2, 1)).distribution()
    assert distribution.log_prob(distribution.sample((2, 0))).shape == (2, 0)


def test_samples_have_the_closed_forms_moments():
    flow, truth = linear()
    x = flow.distribution().sample((10, 2_000)).view(-1, 3)
    error = truth.covariance_matrix.diagonal().sqrt() / len(x) ** 0.5
    assert ((x.mean(dim=0) - truth.loc).abs() < 5 * error).all()
    torch.testing.assert_close(torch.cov(x.T), truth.covariance_matrix, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("context_dim", [0, 1, 2])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_a_batch_of_contexts_is_a_batch_of_distributions(batch, context_dim):
    context = torch.randn((*batch, *[2] * context_dim), dtype=torch.float64)
    distribution = conditional().distribution(context, context_dim)
    truth = shifted_normal(context.reshape(*batch, 2**context_dim).sum(dim=-1))
    assert (distribution.batch_shape, distribution.event_shape) == (batch, (2,))
    for shape in (batch, (4, *batch), (5, 1, *batch)):
        x = torch.randn(*shape, 2, dtype=torch.float64)
        torch.testing.assert_close(distribution.log_prob(x), truth.log_prob(x), rtol=0, atol=1e-6)
    one = torch.randn(2, dtype=torch.float64)  # broadcast to the batch
    torch.testing.assert_close(distribution.log_prob(one), truth.log_prob(one), rtol=0, atol=1e-6)
    samples = distribution.sample((4_000,))
    assert samples.shape == (4_000, *batch, 2)
    assert ((samples.mean(dim=0) - truth.mean).abs() < 5 / 4_000**0.5).all()


def test_expanded_distributions_keep_their_contexts_and_draw_independently():
    context = torch.randn(3, 1, dtype=torch.float64)
    distribution, truth = conditional().distribution(context), shifted_normal(context[:, 0])
    x = torch.randn(7, 5, 3, 2, dtype=torch.float64)
    expanded = distribution.expand((5, 3))
    torch.testing.assert_close(expanded.log_prob(x), truth.expand((5, 3)).log_prob(x), rtol=0, atol=1e-6)
    several = linear()[0].distribution().expand((2, 4))
    drawn = several.sample()
    assert (several.batch_shape, drawn.shape) == ((2, 4), (2, 4, 3))
    assert len(drawn.view(8, 3).unique(dim=0)) == 8
    for one in (distribution, several):
        with pytest.raises(RuntimeError, match="expand"):
            one.expand((7,))


def test_reparameterised_gradients_are_those_of_the_closed_form():
    """E |x|^2 of a normal of mean s c and unit variance has the derivative 2 s c^2 a dimension in s and 2 s^2 c in c."""
    flow, context = conditional(), torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    distribution = flow.distribution(context)
    assert distribution.has_rsample
    x = distribution.rsample((40_000,))
    x.square().sum(dim=1).mean().backward()
    tolerance = 5 * 2 * 2 / 40_000**0.5
    assert abs(flow.velocity.scale.grad - 2 * 2 * 2.0 * 0.25) < tolerance
    assert abs(context.grad - 2 * 2 * 4.0 * 0.5) < 4 * tolerance
    assert flow.distribution(context).sample().grad_fn is None


def test_samples_of_a_base_that_is_not_reparameterised_have_gradients_all_the_same():
    component = Independent(Normal(torch.tensor([[-1.0], [3.0]]), torch.ones(2, 1)), 1)
    base = MixtureSameFamily(Categorical(torch.ones(2)), component)
    assert not base.has_rsample
    flow = ContinuousFlow(Shifted(), 1, base=base, solver=TIGHT).double()
    distribution = flow.distribution(torch.ones(1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(distribution.rsample((10,)).sum(), flow.velocity.scale)
    torch.testing.assert_close(gradient, torch.tensor(10.0, dtype=torch.float64))  # dx / d scale = 1
    x, log_prob = distribution.rsample_and_log_prob((10,))
    torch.testing.assert_close(distribution.log_prob(x.detach()), log_prob, rtol=0, atol=1e-6)


def test_the_score_of_a_value_is_its_gradient():
    flow, truth = linear()
    x = truth.sample((5,)).requires_grad_()
    (score,) = torch.autograd.grad(flow.distribution().log_prob(x).sum(), x)
    torch.testing.assert_close(score, -(x - truth.loc).detach() @ truth.precision_matrix, rtol=1e-6, atol=1e-6)


def test_inside_transformed_distributions_and_independent():
    flow, truth = linear()
    scale = torch.tensor([2.0, -0.5, 3.0], dtype=torch.float64)
    moved = TransformedDistribution(flow.distribution(), AffineTransform(1.0, scale))
    carried = MultivariateNormal(1 + scale * truth.loc, scale.diag() @ truth.covariance_matrix @ scale.diag())
    x = carried.sample((6,))
    torch.testing.assert_close(moved.log_prob(x), carried.log_prob(x), rtol=0, atol=1e-6)
    assert moved.rsample((4, 2)).requires_grad
    positive = TransformedDistribution(flow.distribution(), [ExpTransform()])
    y = positive.sample((6,))
    torch.testing.assert_close(positive.log_prob(y), truth.log_prob(y.log()) - y.log().sum(dim=1), rtol=0, atol=1e-6)
    joint = Independent(flow.distribution().expand((2, 4)), 1)
    assert (joint.batch_shape, joint.event_shape) == ((2,), (4, 3))
    assert isinstance(joint.support, constraints.independent)
    x = joint.sample((5,))
    torch.testing.assert_close(joint.log_prob(x), truth.log_prob(x).sum(dim=-1), rtol=0, atol=1e-5)


def test_kl_by_monte_carlo_is_that_of_the_gaussians_both_ways():
    flow, truth = linear()
    p, q = flow.distribution(), MultivariateNormal(torch.zeros(3, dtype=torch.float64), 4 * torch.eye(3).double())
    for a, b, exact in ((p, q, kl_divergence(truth, q)), (q, p, kl_divergence(q, truth))):
        found = estimate_kl(a, b, 4_000)
        assert 0 < found.standard_error < 1
        assert abs(found.value - exact) < 5 * found.standard_error
        assert abs(kl_divergence(a, b) - exact) < 5 * found.standard_error * 2
    assert kl_divergence(p, flow.distribution()).abs() < 1e-6


def test_kl_of_batches_and_its_gradient():
    """KL(N(2 c, 1) || N(m, 1)) = (2 c - m)^2 / 2 a dimension, two of them."""
    flow, context = conditional(), torch.tensor([[0.5], [1.0], [-1.0]], dtype=torch.float64)
    mean = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = Independent(Normal(mean.expand(2), torch.ones(2, dtype=torch.float64)), 1)
    found = estimate_kl(flow.distribution(context), q, 8_000)
    difference = 2 * context[:, 0] - 0.3
    assert found.value.shape == (3,)
    assert ((found.value - difference**2).abs() < 5 * found.standard_error).all()
    found.value.sum().backward()
    tolerance = 5 * 3 * 2 / 8_000**0.5
    assert abs(mean.grad + (2 * difference).sum()) < tolerance
    assert abs(flow.velocity.scale.grad - (2 * difference * context[:, 0]).sum()) < tolerance
    (gradient,) = torch.autograd.grad(estimate_kl(q, flow.distribution(context[1]), 8_000).value, mean)
    assert abs(gradient - 2 * (0.3 - 2.0)) < tolerance
    one = flow.distribution(context[0])
    assert kl_divergence(one, q.expand((3,))).shape == (3,)  # p's samples are not taken for q's batch
    assert kl_divergence(q.expand((3,)), one).shape == (3,)


def test_kl_refuses_what_would_be_wrong():
    flow = linear()[0]
    with pytest.raises(ValueError, match=r"\(3,\) and q's \(2,\)"):
        estimate_kl(flow.distribution(), conditional().distribution(torch.ones(1).double()))
    with pytest.raises(ValueError, match="num_samples.*at least 2.*1"):
        estimate_kl(flow.distribution(), flow.distribution(), 1)
    rate = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="Independent are not reparameterised"):
        kl_divergence(Independent(Poisson(rate), 1), flow.distribution())
    assert kl_divergence(Independent(Poisson(rate.detach()), 1), flow.distribution()).isfinite()
    assert kl_divergence(Independent(Gamma(rate, rate), 1), flow.distribution()).requires_grad


def test_what_does_not_fit_is_refused():
    distribution = FlowDistribution(linear()[0], validate_args=True)  # torch.compile turns the default off for everyone
    for one in (distribution, distribution.expand((5,))):
        with pytest.raises(ValueError, match="event_shape"):
            one.log_prob(torch.zeros(5, 2).double())
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(torch.tensor([0.0, math.nan, 0.0]).double())
    unchecked = FlowDistribution(linear()[0], validate_args=False)
    for one in (unchecked, unchecked.expand((5,))):
        with pytest.raises(FieldError, match="event shape"):
            one.log_prob(torch.zeros(5, 1).double())
    flow = conditional()
    with pytest.raises(ValueError, match="parameter context"):
        FlowDistribution(flow, torch.tensor([math.nan]), validate_args=True)
    with pytest.raises(ValueError, match="broadcastable"):
        FlowDistribution(flow, torch.ones(3, 1).double(), validate_args=True).log_prob(torch.zeros(4, 2).double())
    with pytest.raises(FieldError, match=r"of 2 dimensions.*shape \(3,\)"):
        flow.distribution(torch.ones(3), context_dim=2)
    with pytest.raises(FieldError, match="is 3"):
        flow.distribution(3)
    with pytest.raises(ValueError, match="context_dim.*-1"):
        flow.distribution(torch.ones(3), context_dim=-1)


def test_a_stochastic_estimator_is_the_flows_own():
    flow = linear()[0].replace(estimator=Hutchinson())
    x = torch.randn(1, 3, dtype=torch.float64).expand(200, 3)
    assert flow.distribution().log_prob(x).std() > 1e-3


@pytest.fixture
def zuko(without_validation):
    return pytest.importorskip("zuko")


def test_as_the_base_of_a_flow_of_zuko(zuko):
    flow, truth = linear()
    built = zuko.distributions.NormalizingFlow(AffineTransform(1.0, 2.0, event_dim=1), flow.distribution())
    carried = MultivariateNormal((truth.loc - 1) / 2, truth.covariance_matrix / 4)
    x = carried.sample((6,))
    torch.testing.assert_close(built.log_prob(x), carried.log_prob(x), rtol=0, atol=1e-5)

    class Base(zuko.lazy.LazyDistribution):
        def __init__(self):
            super().__init__()
            self.flow = conditional()

        def forward(self, c=None):
            return self.flow.distribution(c)

    layers = [zuko.flows.MaskedAutoregressiveTransform(2, 1, hidden_features=[8]).double()]
    lazy = zuko.lazy.Flow(layers, Base())
    context = torch.randn(5, 1, dtype=torch.float64)
    samples, log_prob = lazy(context).rsample_and_log_prob((4,))
    assert (samples.shape, log_prob.shape) == ((4, 5, 2), (4, 5))
    torch.testing.assert_close(lazy(context).log_prob(samples), log_prob, rtol=0, atol=1e-5)
    (-lazy(context).log_prob(samples.detach()).mean()).backward()
    assert all(parameter.grad is not None for parameter in lazy.parameters())


def test_what_is_no_tensor_of_floats_is_refused_without_validation():
    distribution = FlowDistribution(ContinuousFlow(lambda t, x: -x, 2), validate_args=False)
    for value in ([[0.0, 0.0]], torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.complex64)):
        with pytest.raises(FieldError):
            distribution.log_prob(value)


def test_what_has_no_closed_form_says_how_to_estimate_it():
    flow = linear()[0]
    distribution = flow.distribution()
    value = torch.zeros(3, dtype=torch.float64)
    calls = {
        "mean": lambda d: d.mean,
        "variance": lambda d: d.stddev,
        "mode": lambda d: d.mode,
        "entropy": lambda d: d.entropy(),
        "cumulative": lambda d: d.cdf(value),
        "quantiles": lambda d: d.icdf(value),
    }
    for name, call in calls.items():
        for error in (DivflowError, NotImplementedError):
            with pytest.raises(error, match=rf"no closed form of its {name}.*estimate it by samples"):
                call(distribution)
    with pytest.raises(NotImplementedError, match="rsample_and_log_prob"):
        Independent(flow.distribution().expand((2,)), 1).entropy()


@pytest.fixture
def pyro():
    """Importing Pyro changes torch's validation for everyone, too."""
    before = Distribution._validate_args
    yield pytest.importorskip("pyro")
    Distribution.set_default_validate_args(before)


def test_in_models_and_guides_of_pyro(pyro):
    flow, truth = linear()
    data = truth.sample((6,))

    def model():
        pyro.sample("z", flow.distribution())
        with pyro.plate("rows", len(data)):
            pyro.sample("x", flow.distribution(), obs=data)

    trace = pyro.poutine.trace(model).get_trace()
    expected = truth.log_prob(data).sum() + truth.log_prob(trace.nodes["z"]["value"])
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=0, atol=1e-4)
    velocity = LinearVelocity((3,)).double()
    trained = ContinuousFlow(velocity, (3,))

    def guide():
        pyro.module("velocity", velocity)
        pyro.sample("z", trained.distribution())

    before = {name: value.clone() for name, value in velocity.state_dict().items()}
    inference = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    assert math.isfinite(inference.step())
    assert any(not torch.equal(value, before[name]) for name, value in velocity.state_dict().items())

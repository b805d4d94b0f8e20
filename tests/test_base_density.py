"""Every distribution of torch as a flow's base: what is loaded, moved, copied or outside of a support."""

import contextlib
import copy
import functools
import inspect
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Generator, nn
from torch import distributions as D
from torch.distributions import (
    AffineTransform,
    ExpTransform,
    Independent,
    SigmoidTransform,
    StickBreakingTransform,
    TransformedDistribution,
)

from divflow.distributions import BaseError, MeanFreeNormal
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow


def row(*numbers):
    return torch.tensor(numbers)


# Each of one number, which is a location, a scale, a rate or a shape of two entries; and a number outside of its support.
BASES = {
    "Beta": (lambda a: D.Beta(row(a, 2.0), row(3.0, a)), 1.5),
    "Cauchy": (lambda a: D.Cauchy(row(a, 0.0), row(1.0, a)), None),
    "Chi2": (lambda a: D.Chi2(row(a, 3.0)), -0.1),
    "ContinuousBernoulli": (lambda a: D.ContinuousBernoulli(logits=row(a, -1.0)), 1.1),
    "ContinuousBernoulli, probs": (lambda a: D.ContinuousBernoulli(probs=row(a / 9, 0.2)), -0.1),
    "Exponential": (lambda a: D.Exponential(row(a, 1.0)), -0.1),
    "FisherSnedecor": (lambda a: D.FisherSnedecor(row(a, 5.0), row(6.0, a)), -0.1),
    "Gamma": (lambda a: D.Gamma(row(a, 2.0), row(1.0, a)), -0.1),
    "Gumbel": (lambda a: D.Gumbel(row(a, 0.0), row(1.0, a)), None),
    "HalfCauchy": (lambda a: D.HalfCauchy(row(a, 1.0)), -0.1),
    "HalfNormal": (lambda a: D.HalfNormal(row(a, 1.0)), -0.1),
    "InverseGamma": (lambda a: D.InverseGamma(row(a, 2.0), row(1.0, a)), -0.1),
    "Kumaraswamy": (lambda a: D.Kumaraswamy(row(a, 2.0), row(1.0, a)), 1.1),
    "Laplace": (lambda a: D.Laplace(row(a, 0.0), row(1.0, a)), None),
    "LogNormal": (lambda a: D.LogNormal(row(a, 0.0), row(1.0, a)), -0.1),
    "LogitRelaxedBernoulli": (
        lambda a: D.relaxed_bernoulli.LogitRelaxedBernoulli(torch.tensor(0.7), logits=row(a, -1.0)),
        None,
    ),
    "LowRankMultivariateNormal": (
        lambda a: D.LowRankMultivariateNormal(row(a, 0.0), torch.tensor([[a], [1.0]]), row(1.0, a)),
        None,
    ),
    "MixtureSameFamily": (
        lambda a: D.MixtureSameFamily(
            D.Categorical(logits=row(a, 1.0)), Independent(D.Normal(torch.tensor([[a, 0.0], [-a, 1.0]]), 1.0), 1)
        ),
        None,
    ),
    "MixtureSameFamily, probs, of uniforms": (
        lambda a: D.MixtureSameFamily(
            D.Categorical(probs=row(a, 1.0)),
            Independent(D.Uniform(torch.tensor([[0.0, 0.0], [1.0, a]]), torch.tensor([[1.5, 1.0], [2.0, 9.0]])), 1),
        ),
        9.5,
    ),
    "MixtureSameFamily, of Pareto's": (
        lambda a: D.MixtureSameFamily(
            D.Categorical(logits=row(a, 1.0)),
            Independent(D.Pareto(torch.tensor([[1.0, a], [2.0, 3.0]]), torch.ones(2, 2)), 1),
        ),
        0.5,
    ),
    "MultivariateNormal": (lambda a: D.MultivariateNormal(row(a, 0.0), torch.tensor([[a + 1, 0.3], [0.3, 1.0]])), None),
    "MultivariateNormal, precision": (
        lambda a: D.MultivariateNormal(row(a, 0.0), precision_matrix=torch.tensor([[a + 1, 0.3], [0.3, 1.0]])),
        None,
    ),
    "Normal": (lambda a: D.Normal(row(a, 0.0), row(1.0, a)), None),
    "Pareto": (lambda a: D.Pareto(row(a, 1.0), row(2.0, a)), 0.5),
    "RelaxedBernoulli": (lambda a: D.RelaxedBernoulli(torch.tensor(0.7), logits=row(a, -1.0)), 1.1),
    "RelaxedBernoulli, probs": (lambda a: D.RelaxedBernoulli(torch.tensor(0.7), probs=row(a / 9, 0.3)), -0.1),
    "StudentT": (lambda a: D.StudentT(row(a, 3.0), row(a, 0.0), row(1.0, a)), None),
    "TransformedDistribution": (
        lambda a: TransformedDistribution(
            Independent(D.Uniform(torch.zeros(2), row(a, 2.0)), 1), [AffineTransform(row(a, 0.0), row(3.0, -a))]
        ),
        -40.0,
    ),
    "TransformedDistribution, cached": (
        lambda a: TransformedDistribution(
            D.Normal(row(a, 0.0), row(1.0, a)),
            [SigmoidTransform(cache_size=1), AffineTransform(row(a, 0.0), row(3.0, a), cache_size=1)],
        ),
        -40.0,
    ),
    "TransformedDistribution, inverse": (
        lambda a: TransformedDistribution(D.Gamma(row(a, 2.0), row(1.0, a)), [ExpTransform().inv]),
        None,
    ),
    "TransformedDistribution, of a simplex": (
        lambda a: TransformedDistribution(D.Dirichlet(row(a, 2.0, 1.0)), [StickBreakingTransform().inv]),
        None,
    ),
    "Uniform": (lambda a: D.Uniform(row(a, -1.0), row(9.0, a)), 11.0),
    "VonMises": (lambda a: D.VonMises(row(a, 0.0), row(1.0, a)), None),
    "Weibull": (lambda a: D.Weibull(row(a, 1.0), row(2.0, a)), -0.1),
}
if hasattr(D, "GeneralizedPareto"):  # since torch 2.10
    BASES["GeneralizedPareto"] = (lambda a: D.GeneralizedPareto(row(a, 0.0), row(1.0, a), row(0.3, 0.1)), -40.0)
REFUSED = {
    "Bernoulli": lambda: D.Bernoulli(torch.full((3,), 0.3)),
    "Binomial": lambda: D.Binomial(4, torch.full((3,), 0.3)),
    "Geometric": lambda: D.Geometric(torch.full((3,), 0.3)),
    "NegativeBinomial": lambda: D.NegativeBinomial(4, torch.full((3,), 0.3)),
    "Poisson": lambda: D.Poisson(torch.ones(3)),
    "Categorical": lambda: D.Categorical(torch.ones(3, 4)),
    "Multinomial": lambda: D.Multinomial(4, torch.ones(3)),
    "OneHotCategorical": lambda: D.OneHotCategorical(torch.ones(3)),
    "OneHotCategoricalStraightThrough": lambda: D.OneHotCategoricalStraightThrough(torch.ones(3)),
    "Dirichlet": lambda: D.Dirichlet(torch.ones(3)),
    "LogisticNormal": lambda: D.LogisticNormal(torch.zeros(2), torch.ones(2)),
    "RelaxedOneHotCategorical": lambda: D.RelaxedOneHotCategorical(torch.tensor(0.7), torch.ones(3)),
    "ExpRelaxedCategorical": lambda: D.relaxed_categorical.ExpRelaxedCategorical(torch.tensor(0.7), torch.ones(3)),
    "LKJCholesky": lambda: D.LKJCholesky(3, torch.tensor(1.0)),
    "Wishart": lambda: D.Wishart(torch.tensor(4.0), torch.eye(3)),
    "a mixture of Poisson's": lambda: D.MixtureSameFamily(D.Categorical(torch.ones(3, 2)), D.Poisson(torch.ones(3, 2))),
    "a moved Dirichlet": lambda: TransformedDistribution(D.Dirichlet(torch.ones(3)), AffineTransform(0.0, 2.0)),
}
# Of whose own samples torch refuses some, or gives them another density.
_PARTLY = ("MixtureSameFamily, probs, of uniforms", "MixtureSameFamily, of Pareto's")
_NONE_OF_ITS_OWN = {"Distribution", "ExponentialFamily", "Independent"}
each = pytest.mark.parametrize("name", BASES)


def base(name, a=2.0):
    made = BASES[name][0](a)
    return Independent(made, len(made.batch_shape)) if made.batch_shape else made


def flow_of(distribution, velocity=lambda t, x: torch.zeros_like(x)):
    return ContinuousFlow(velocity, distribution.event_shape, base=distribution)


def draws(flow, seed=0):
    return flow.sample_base(5, Generator().manual_seed(seed))


def test_all_of_them_are_here():
    known = {name.partition(",")[0] for name in (*BASES, *REFUSED)} | _NONE_OF_ITS_OWN
    theirs = {
        name for name in D.__all__ if inspect.isclass(getattr(D, name)) and issubclass(getattr(D, name), D.Distribution)
    }
    assert theirs <= known


@each
def test_is_the_distribution_that_was_given(name):
    distribution, flow = base(name), flow_of(base(name))
    torch.manual_seed(0)
    x = distribution.sample((5,))
    torch.manual_seed(0)
    torch.testing.assert_close(flow.sample_base(5), x, rtol=0, atol=0)
    if name not in _PARTLY:
        torch.testing.assert_close(flow.base.log_prob(x), distribution.log_prob(x), rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(flow.log_prob(x), distribution.log_prob(x), rtol=1e-3, atol=1e-3)


@each
def test_is_the_loaded_one_after_it_was_used(name):
    """Whatever torch computed of the old one, by a sample, a density, or a look at it."""
    one, other, fresh, old = (flow_of(base(name, a)) for a in (2.0, 3.0, 3.0, 2.0))
    for flow in (one, other):
        x = draws(flow)
        flow.base.log_prob(x)
        for part in (flow.base.distribution, getattr(flow.base.distribution, "base_dist", None)):
            for attribute in ("probs", "logits", "covariance_matrix", "_proposal_r"):
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    getattr(part, attribute, None)
    for ways in (
        lambda: one.load_state_dict(copy.deepcopy(other.state_dict())),
        lambda: one.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        lambda: [mine.copy_(theirs) for mine, theirs in zip(one.buffers(), other.buffers(), strict=True)],
    ):
        one.load_state_dict(old.state_dict())
        draws(one)
        ways()
        x = draws(fresh)
        torch.testing.assert_close(draws(one), x, rtol=0, atol=0)
        torch.testing.assert_close(one.base.log_prob(x), fresh.base.log_prob(x), rtol=0, atol=0)
    assert not torch.equal(draws(old), x) or not torch.equal(old.base.log_prob(x), fresh.base.log_prob(x))


@each
def test_goes_where_the_flow_goes(name):
    flow = flow_of(base(name))
    x = draws(flow)
    expected = flow.base.log_prob(x)
    for other in (copy.deepcopy(flow), copy.deepcopy(copy.deepcopy(flow))):
        torch.testing.assert_close(draws(other), x, rtol=0, atol=0)
        torch.testing.assert_close(other.base.log_prob(x), expected, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(flow.base))
    torch.testing.assert_close(again.log_prob(x), expected, rtol=0, atol=0)
    fine = flow.double()
    assert draws(fine).dtype == torch.float64
    if name != "GeneralizedPareto":  # torch's own density takes float32 alone
        torch.testing.assert_close(fine.base.log_prob(x.double()), expected.double(), rtol=1e-4, atol=1e-4)


@each
def test_a_row_outside_has_no_density_and_the_others_theirs(name):
    outside = BASES[name][1]
    flow = flow_of(base(name)).base
    x = flow.sample(5, Generator().manual_seed(0))
    expected = flow.log_prob(x)
    assert expected.isfinite().all()
    if outside is None:
        return
    for column in (0, 1):
        z = x.clone()
        z[1, column] = outside
        z.requires_grad_()
        log_prob = flow.log_prob(z)
        assert log_prob[1] == -math.inf
        kept = [0, 2, 3, 4]
        torch.testing.assert_close(log_prob[kept], expected[kept])
        (gradient,) = torch.autograd.grad(log_prob.sum() + 0 * z.sum(), z)
        assert gradient.isfinite().all()
        z = z.detach()
        z[1] = math.nan
        log_prob = flow.log_prob(z)
        assert log_prob.isnan().tolist() == [False, True, False, False, False]


ONE = torch.ones(1, dtype=torch.float64)
KNOWN = {
    "uniform": (D.Uniform(ONE, 3 * ONE), lambda x: scipy.stats.uniform(1, 2).pdf(x)),
    "gamma": (D.Gamma(2.5 * ONE, 0.5 * ONE), lambda x: scipy.stats.gamma(2.5, scale=2).pdf(x)),
    "pareto": (D.Pareto(2 * ONE, 3 * ONE), lambda x: scipy.stats.pareto(3, scale=2).pdf(x)),
    "weibull": (D.Weibull(2 * ONE, 3 * ONE), lambda x: scipy.stats.weibull_min(3, scale=2).pdf(x)),
    "gumbel": (D.Gumbel(ONE, 2 * ONE), lambda x: scipy.stats.gumbel_r(1, 2).pdf(x)),
    "what is made of a beta": (
        TransformedDistribution(D.Beta(2 * ONE, 3 * ONE), AffineTransform(-2 * ONE, 4 * ONE)),
        lambda x: scipy.stats.beta(2, 3, loc=-2, scale=4).pdf(x),
    ),
    "what is made of an exponential": (
        TransformedDistribution(D.Exponential(ONE), AffineTransform(ONE, -2 * ONE)),
        lambda x: scipy.stats.expon().pdf((1 - x) / 2) / 2,
    ),
    "what is made of a normal": (
        TransformedDistribution(D.Normal(0 * ONE, ONE), [SigmoidTransform(), AffineTransform(ONE, 2 * ONE)]),
        lambda x: np.where((x > 1) & (x < 3), _logit_normal(np.clip((x - 1) / 2, 1e-9, 1 - 1e-9)) / 2, 0),
    ),
    "a mixture of uniforms": (
        D.MixtureSameFamily(
            D.Categorical(torch.tensor([[0.3, 0.7]]).double()),
            D.Uniform(torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[1.0, 4.0]]).double()),
        ),
        lambda x: 0.3 * scipy.stats.uniform(0, 1).pdf(x) + 0.7 * scipy.stats.uniform(2, 2).pdf(x),
    ),
    "a mixture of Pareto's": (
        D.MixtureSameFamily(
            D.Categorical(torch.tensor([[0.3, 0.7]]).double()),
            D.Pareto(torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[2.0, 2.0]]).double()),
        ),
        lambda x: 0.3 * scipy.stats.pareto(2, scale=1).pdf(x) + 0.7 * scipy.stats.pareto(2, scale=3).pdf(x),
    ),
}


def _logit_normal(p):
    return scipy.stats.norm.pdf(np.log(p / (1 - p))) / (p * (1 - p))


@pytest.mark.parametrize("name", KNOWN)
def test_densities_over_all_of_the_line_are_those_of_scipy(name):
    """Also of what is made of parts, of which torch knows no common support."""
    distribution, known = KNOWN[name]
    x = torch.linspace(-5, 15, 400, dtype=torch.float64)[:, None]  # no point of which is an end
    density = flow_of(Independent(distribution, 1)).base.log_prob(x).exp()
    torch.testing.assert_close(density, torch.as_tensor(known(x.squeeze(1).numpy())))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_density_over_all_entries_is_refused(name):
    made = REFUSED[name]()
    distribution = Independent(made, len(made.batch_shape)) if made.batch_shape else made
    with pytest.raises(BaseError, match="is discrete|lies on a surface"):
        flow_of(distribution)
    assert issubclass(BaseError, DivflowError)


@pytest.mark.parametrize("made", [None, *BASES], ids=str)
def test_samples_are_of_the_velocitys_precision(made):
    if made == "GeneralizedPareto":
        pytest.skip("torch's own density takes float32 alone")
    distribution = None if made is None else base(made)
    net = nn.Linear(2, 2)
    flow = ContinuousFlow(_Velocity(net), 2, base=distribution)
    assert draws(flow).dtype == torch.float32
    net.double()
    x, log_prob = flow.rsample_and_log_prob(3)
    assert x.dtype == log_prob.dtype == flow.sample(3).dtype == flow.distribution().rsample((2,)).dtype == torch.float64
    assert flow.sample_base(2000).unique(dim=0).shape[0] == 2000
    net.float()
    assert flow.sample(3).dtype == torch.float32
    net.to(torch.bfloat16)
    assert flow.sample_base(3).dtype == torch.float32  # no trajectory is solved in less
    flow.to(torch.bfloat16)
    assert flow.sample_base(3).dtype == torch.float32
    flow.double()
    assert flow.sample(3).dtype == torch.float64


class _Velocity(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return 0.01 * self.net(x).tanh()


def test_a_flow_as_the_base_of_another_is_saved_and_moved():
    inner = [ContinuousFlow(_Velocity(nn.Linear(2, 2)), 2) for _ in range(2)]
    with pytest.raises(BaseError, match="require grad"):
        flow_of(inner[0].distribution())
    one, other = (flow_of(flow.requires_grad_(False).distribution()) for flow in inner)
    one.load_state_dict(other.state_dict())
    x = torch.randn(3, 2)
    torch.testing.assert_close(one.log_prob(x), inner[1].log_prob(x))
    assert one.double().log_prob(x.double()).dtype == torch.float64


def test_a_centre_is_looked_for_beside_its_own_row():
    particles = MeanFreeNormal((3, 2))
    x = torch.zeros(2, 3, 2)
    x[0, :, 0] = 0.3
    x[1] = 1e3 * torch.tensor([[1.0, 0], [-1, 0], [0, 0]])
    with pytest.raises(BaseError, match=r"one lies 0\.3 off \(row 0 of 2"):
        particles.log_prob(x)
    assert particles.log_prob(x[1:]).isfinite().all()
    moving = lambda t, x: x - x.mean(dim=1, keepdim=True) + 0.3 * (x.abs().amax(dim=(1, 2), keepdim=True) < 1)  # noqa: E731
    with pytest.raises(BaseError, match=r"moves it by 0\.3"):
        particles.check_velocity(moving, 0.0, x)
    particles.check_velocity(lambda t, x: x - x.mean(dim=1, keepdim=True), 0.0, x)


@each
def test_what_torch_computed_before_is_not_saved(name):
    """A state of one that was used fits one that was not, and the other way round."""
    used = base(name)
    part = getattr(used, "base_dist", used)
    for attribute in ("probs", "logits", "covariance_matrix", "precision_matrix", "scale_tril", "_proposal_r"):
        with contextlib.suppress(NotImplementedError, RuntimeError):
            getattr(part, attribute, None)
    assert flow_of(used).state_dict().keys() == flow_of(base(name)).state_dict().keys()


class ByANetwork(D.Transform):
    """x + net(0), by a function that is bound to the network, as zuko's transforms are."""

    domain = codomain = D.constraints.real_vector
    bijective = True

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def _call(self, x):
        return x + self.shift()

    def _inverse(self, y):
        return y - self.shift()

    def log_abs_det_jacobian(self, x, y):
        return x.new_zeros(x.shape[:-1])


def test_networks_in_functions_are_parts_of_a_base():
    net = nn.Linear(2, 2)
    for shift in (functools.partial(net.forward, torch.zeros(2)), functools.partial(net, torch.zeros(2))):
        base = D.TransformedDistribution(Independent(D.Normal(torch.zeros(2), 1.0), 1), [ByANetwork(shift)])
        net.requires_grad_(True)
        with pytest.raises(BaseError, match="require grad"):
            flow_of(base)
        net.requires_grad_(False)
        flow, x = flow_of(base), torch.randn(3, 2)
        expected = base.log_prob(x)
        torch.testing.assert_close(flow.base.log_prob(x), expected)
        other = flow_of(base)
        for tensor in other.base.state_dict().values():
            tensor.add_(1.0)
        assert not torch.allclose(other.base.log_prob(x), expected)
        other.load_state_dict(flow.state_dict())
        for again in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow.base))):
            torch.testing.assert_close(getattr(again, "base", again).log_prob(x), expected)

"""SDEs: marginals against simulation and the moments' equations, priors, and an SDE of one's own."""

import math

import pytest
import torch

from divflow.divergence import FieldError
from divflow.score import SDE, SDEError, SubVariancePreserving, VarianceExploding, VariancePreserving


class OrnsteinUhlenbeck(SDE):
    """dx = -x dt + sqrt(2) dw, by two functions alone."""

    def mean_scale(self, t):
        return torch.exp(-t)

    def std(self, t):
        return torch.sqrt(-torch.expm1(-2 * t))


SDES = {
    "vp": VariancePreserving(),
    "vp of another length": VariancePreserving(0.5, 3.0, T=2.0),
    "ve": VarianceExploding(0.02, 5.0),
    "subvp": SubVariancePreserving(),
    "own": OrnsteinUhlenbeck(T=1.5),
}


@pytest.mark.parametrize("name", SDES)
def test_marginals_against_simulation(name):
    """Euler-Maruyama of dx = f x dt + g dw from one point, with the extrapolated error of its step."""
    sde, paths, steps = SDES[name], 40_000, 400
    generator = torch.Generator().manual_seed(0)
    stop = 0.6 * sde.T
    x = torch.full((paths, 1), 1.7, dtype=torch.float64)
    step = stop / steps
    for i in range(steps):
        t = torch.tensor((i + 0.5) * step, dtype=torch.float64)  # coefficients at the middle: second order in the mean
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = x + sde.drift(t, x) * step + sde.diffusion(t) * math.sqrt(step) * noise
    alpha, sigma = sde.marginal(stop)
    assert abs(x.mean() - 1.7 * alpha) < 5 * sigma / math.sqrt(paths) + 0.005 * 1.7 * alpha
    assert abs(x.std() / sigma - 1) < 5 / math.sqrt(2 * paths) + 0.005


@pytest.mark.parametrize("name", SDES)
def test_marginals_solve_the_equations_of_the_moments(name):
    """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2, by finite differences."""
    sde = SDES[name]
    t, h = torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * sde.T, 1e-5
    (alpha, sigma), before, after = sde.marginal(t), sde.marginal(t - h), sde.marginal(t + h)
    f, squared = sde.coefficients(t)
    torch.testing.assert_close((after.mean_scale - before.mean_scale) / (2 * h), f * alpha, rtol=1e-6, atol=1e-7)
    slope = (after.std**2 - before.std**2) / (2 * h)
    torch.testing.assert_close(slope, 2 * f * sigma**2 + squared, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sde.diffusion(t) ** 2, squared)
    x = torch.randn(25, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(sde.drift(t, x), f[:, None, None] * x)


@pytest.mark.parametrize("name", SDES)
def test_closed_forms_are_those_that_follow_from_the_marginal(name):
    t = torch.linspace(0.01, 1.0, 20, dtype=torch.float64) * SDES[name].T
    for ours, derived in zip(SDES[name].coefficients(t), SDE.coefficients(SDES[name], t), strict=True):
        torch.testing.assert_close(ours, derived, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_ends(name):
    sde = SDES[name]
    start, end = sde.marginal(0.0), sde.marginal(sde.T)
    assert (start.mean_scale, start.std) == (1, 0)
    assert end.std > 4 * end.mean_scale or name in ("own", "vp of another length")
    assert sde.marginal(torch.tensor([sde.epsilon, sde.T])).std.shape == (2,)
    assert sde.marginal(sde.epsilon).std < 0.01 * end.std


def test_published_values():
    """Song et al. 2021: VP's beta from 0.1 to 20, sub-VP's variance bounded by its square, VE geometric."""
    t = torch.tensor(0.5, dtype=torch.float64)
    integral = 0.1 * 0.5 + 19.9 * 0.125
    assert VariancePreserving().marginal(t).mean_scale.item() == pytest.approx(math.exp(-integral / 2))
    assert VariancePreserving().marginal(t).std.item() == pytest.approx(math.sqrt(1 - math.exp(-integral)))
    assert VariancePreserving().diffusion(t).item() == pytest.approx(math.sqrt(0.1 + 19.9 * 0.5))
    assert SubVariancePreserving().marginal(t).std.item() == pytest.approx(1 - math.exp(-integral))
    middle = VarianceExploding(0.01, 50.0).marginal(t).std.item()
    assert math.hypot(middle, 0.01) == pytest.approx(0.01 * math.sqrt(5000))
    assert VarianceExploding(0.01, 50.0, epsilon=0.1).marginal(torch.tensor(1.0).double()).std.item() == pytest.approx(
        50.0, rel=1e-7
    )


@pytest.mark.parametrize("event", [(), (5,), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding, SubVariancePreserving])
def test_prior(kind, event):
    sde = kind(event_shape=event)
    x = torch.randn(6, *event, dtype=torch.float64)
    std = sde.marginal(torch.tensor(1.0, dtype=torch.float64)).std
    expected = torch.distributions.Normal(0.0, std).log_prob(x).reshape(6, -1).sum(dim=1)
    torch.testing.assert_close(sde.prior.log_prob(x), expected, rtol=1e-6, atol=1e-6)
    assert sde.prior.log_prob(x[:0]).shape == (0,)
    draws = sde.prior.draw(x.new_empty(20_000, *event), torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, *event)
    assert abs(draws.std() / std - 1) < 0.02
    assert sde.prior.sample((7,)).shape == (7, *event)


class Own(SDE):
    """alpha = exp(-rate t), sigma = sqrt(t), with an attribute of its own."""

    def __init__(self, rate):
        super().__init__(epsilon=1e-3)
        object.__setattr__(self, "rate", rate)

    def mean_scale(self, t):
        return torch.exp(-self.rate * t)

    def std(self, t):
        return t.sqrt()


def test_an_sde_of_ones_own():
    assert Own(1.0) != Own(2.0)
    assert Own(1.0).diffusion(0.0) == 1  # where sqrt(t) has no slope
    t = torch.tensor(0.3).expand(4)
    torch.testing.assert_close(Own(2.0).drift(t, torch.ones(4, 1)), torch.full((4, 1), -2.0))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"mean_scale": lambda self, t: 1.0}, r"mean_scale\(t\).*t's shape.*1\.0"),
        ({"mean_scale": lambda self, t: 1 - t}, r"mean_scale\(t\).*positive.*from 0 to"),
        (
            {"std": lambda self, t: t * (1.2 - t), "mean_scale": lambda self, t: 1 + 0 * t},
            "squared diffusion.*must not decrease",
        ),
        ({"std": lambda self, t: -t}, r"std\(t\) must be positive"),
    ],
)
def test_functions_that_are_no_sdes_are_refused(functions, message):
    with pytest.raises(SDEError, match=message):
        type("Wrong", (Own,), functions)(1.0).check()


def test_event_shapes_are_tuples():
    assert VariancePreserving(event_shape=3).event_shape == (3,)
    assert VariancePreserving(event_shape=[3, 4]) == VariancePreserving(event_shape=(3, 4))
    assert hash(VarianceExploding(event_shape=[2])) == hash(VarianceExploding(event_shape=(2,)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VariancePreserving().prior, SDEError, r"no event shape.*VariancePreserving\(event_shape="),
        (
            lambda: VariancePreserving(event_shape=(3, 4, 4)).prior.log_prob(torch.zeros(2, 4, 4)),
            SDEError,
            r"\(3, 4, 4\).*\(2, 4, 4\).*\(4, 4\)",
        ),
        (lambda: VariancePreserving(event_shape=2).prior.log_prob(torch.zeros(3, 2).long()), FieldError, "int64"),
        (lambda: VariancePreserving().marginal(1.5), SDEError, r"\[0, T\].*1\.5"),
        (lambda: VarianceExploding().diffusion(torch.tensor([0.5, -0.25])), SDEError, r"from -0\.25 to 0\.5"),
        (lambda: VariancePreserving().drift(float("nan"), torch.zeros(2, 2)), SDEError, "nan"),
        (lambda: VariancePreserving().drift(0.5, torch.zeros(2, 2).long()), FieldError, "int64"),
        (lambda: VariancePreserving().drift(torch.ones(3), torch.zeros(2, 2)), FieldError, r"\(2,\).*\(3,\)"),
        (lambda: VariancePreserving(event_shape=[2, -1]), ValueError, "event_shape.*-1"),
        (lambda: VariancePreserving(event_shape="ab"), ValueError, "event_shape.*'ab'"),
        (lambda: VariancePreserving(20.0, 0.1), SDEError, "beta_min < beta_max.*20"),
        (lambda: VarianceExploding(-1.0, 2.0), SDEError, "sigma_min < sigma_max.*-1"),
        (lambda: VariancePreserving(epsilon=1.0), SDEError, r"epsilon.*\(0, T\).*1\.0"),
        (lambda: SubVariancePreserving(epsilon=0.0), SDEError, r"epsilon.*0\.0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()

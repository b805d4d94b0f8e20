"""Samplers: mean and covariance within error bars, counted evaluations, a generator that makes them again."""

import pytest
import torch
from covering import alternated, covered
from gaussian_scores import Gaussian

from divflow.divergence import FieldError
from divflow.networks import MLP
from divflow.score import ScaledScore, SDEError, SubVariancePreserving, VarianceExploding, VariancePreserving
from divflow.score.sampling import (
    AnnealedLangevin,
    PredictorCorrector,
    ProbabilityFlowODE,
    ReverseSDE,
    SamplingError,
    denoise,
)
from divflow.solver import Solver

COUNT = 20_000
SDES = {
    "vp": lambda event: VariancePreserving(event_shape=event, epsilon=1e-3),
    "ve": lambda event: VarianceExploding(0.01, 20.0, event_shape=event),
    "subvp": lambda event: SubVariancePreserving(event_shape=event),
}
SAMPLERS = {
    "ode": ProbabilityFlowODE,
    "reverse": lambda sde: ReverseSDE(sde, 400),
    "corrected": lambda sde: PredictorCorrector(sde, 200),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_moments(samples, mean, covariance, bias):
    """Five standard errors, and a relative bias of the method's steps."""
    flat, count = samples.flatten(1), len(samples)
    variances = covariance.diagonal()
    assert ((flat.mean(dim=0) - mean).abs() < 5 * (variances / count).sqrt() + bias).all()
    scale = (variances[:, None] * variances[None]).sqrt()
    assert ((torch.cov(flat.T) - covariance).abs() / scale < 5 * (2 / count) ** 0.5 + bias).all()


@covered(name=SDES, sampler=SAMPLERS, event=[(3,), (1, 2, 2)])
def test_mean_and_covariance(name, sampler, event):
    data, sde = Gaussian(event), SDES[name](event)
    samples = SAMPLERS[sampler](sde)(data.score(sde), COUNT, seeded()).samples
    assert samples.shape == (COUNT, *event)
    assert samples.dtype == torch.float64
    # The prior has no mean at T, where the data leave alpha(T) of theirs; Euler's steps add their own bias.
    remaining = (sde.marginal(sde.T).mean_scale / sde.marginal(sde.T).std).item()
    assert_moments(samples, data.mean, data.covariance, bias=0.02 + remaining)


def test_euler_maruyama_converges():
    """The bias of the covariance falls with the number of steps."""
    data, sde = Gaussian((2,)), SDES["vp"]((2,))
    score, errors = data.score(sde), []
    for steps in (10, 40, 160):
        samples = ReverseSDE(sde, steps, denoise=False)(score, 100_000, seeded()).samples
        errors.append((torch.cov(samples.T) - data.covariance_at(sde, sde.epsilon)).norm().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@alternated(name=SDES, std=[0.01, 0.05])
def test_sharp_data_keep_their_width(name, std):
    """No noise of the last steps is left in the samples, and no adaptive step leaps over the end."""
    sde = type(SDES[name]((1,)))(event_shape=1)

    def score(t, x):
        alpha, sigma = sde.marginal(t)
        return -x / (alpha**2 * std**2 + sigma**2)

    for sampler in SAMPLERS.values():
        samples = sampler(sde)(lambda t, x: score(t, x), COUNT, seeded()).samples
        assert samples.std().item() == pytest.approx(std, rel=0.08)


def test_langevin_of_a_time_free_score():
    data = Gaussian((2,))
    precision = torch.linalg.inv(data.covariance)

    def score(x):
        return -(x - data.mean) @ precision

    sampler = AnnealedLangevin(2, [1.0, 0.5], steps_per_level=400, snr=0.2)
    result = sampler(lambda x: score(x.double()).to(x.dtype), COUNT, seeded())
    assert result.evaluations == 800
    # Unadjusted: each eigenvalue v of the covariance is v / (1 - a / (2 v)) in the limit, a = 0.02 being the step.
    values, basis = torch.linalg.eigh(data.covariance)
    biased = basis @ torch.diag(values / (1 - 0.02 / (2 * values))) @ basis.T
    assert_moments(result.samples.double(), data.mean, biased, bias=0.01)


def test_annealed_langevin_gives_the_level_as_time_and_denoises():
    levels = []

    def score(t, x):
        levels.append(t.item())
        return -x / (1 + t**2)

    result = AnnealedLangevin((2, 2), [2.0, 0.5], steps_per_level=3, denoise=True)(score, 5, seeded())
    assert levels == [2.0] * 3 + [0.5] * 4
    assert result.evaluations == 7
    assert result.samples.shape == (5, 2, 2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda sde: ReverseSDE(sde, 7), 8),
        (lambda sde: ReverseSDE(sde, 7, denoise=False), 7),
        (lambda sde: PredictorCorrector(sde, 5, corrector_steps=3), 5 * 4 + 1),
        (lambda sde: PredictorCorrector(sde, 5, denoise=False), 10),
        (lambda sde: ProbabilityFlowODE(sde, Solver("rk4", options={"step_size": 0.1})), 57),
        (lambda sde: ProbabilityFlowODE(sde, Solver("rk4", options={"step_size": 0.1}), denoise=True), 58),
    ],
)
def test_evaluations_are_what_the_score_sees(make, expected):
    calls = []

    def score(t, x):
        calls.append(t.item())
        return -x

    sde = VariancePreserving(event_shape=2)
    result = make(sde)(score, 3, seeded())
    assert result.evaluations == len(calls)
    assert result.evaluations == expected
    assert max(calls) == sde.T
    assert min(calls) > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_generator_makes_the_samples_again(sampler):
    sde = VariancePreserving(event_shape=2)
    network = ScaledScore(MLP(2, hidden=(8,)), sde)
    draw = SAMPLERS[sampler](sde)
    state = torch.get_rng_state()
    first = draw(network, 6, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(network, 6, seeded(1)).samples, first.samples)
    assert not torch.equal(draw(network, 6, seeded(2)).samples, first.samples)
    assert not first.samples.requires_grad
    assert first.samples.dtype == torch.float32
    assert draw(network, 0).samples.shape == (0, 2)


def test_samples_do_not_depend_on_the_rest_of_the_batch():
    """The corrector's step is a function of time alone: what one score's row does leaves the others alone."""
    sde = VariancePreserving(event_shape=1)

    def score(factor):
        def value(t, x):
            scale = torch.ones_like(x)
            scale[-1] = factor
            return -scale * x

        return value

    a, b = (PredictorCorrector(sde, 20)(score(factor), 4, seeded()).samples for factor in (1.0, 3.0))
    assert torch.equal(a[:-1], b[:-1])
    assert not torch.equal(a[-1], b[-1])


def test_denoising_is_the_posterior_mean():
    """Tweedie: for Gaussian data E[x_0 | x_t] is the linear regression on x_t."""
    data = Gaussian((2, 2))
    sde, t = SDES["vp"]((2, 2)), 0.3
    x = data.sample(5)
    alpha = sde.marginal(torch.tensor(t, dtype=x.dtype)).mean_scale
    gain = alpha * data.covariance @ torch.linalg.inv(data.covariance_at(sde, t))
    expected = data.mean + (x.flatten(1) - alpha * data.mean) @ gain.T
    torch.testing.assert_close(denoise(data.score(sde), sde, x, t).flatten(1), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReverseSDE(VariancePreserving())(lambda t, x: -x, 3), SDEError, "no event shape"),
        (lambda: ReverseSDE(VariancePreserving(event_shape=2), 0), ValueError, "num_steps.*0"),
        (lambda: PredictorCorrector(VariancePreserving(event_shape=2), snr=-1.0), ValueError, r"snr.*-1\.0"),
        (lambda: PredictorCorrector(VariancePreserving(event_shape=2), corrector_steps=0), ValueError, "corrector.*0"),
        (lambda: AnnealedLangevin(2, []), ValueError, "sigmas.*empty"),
        (lambda: AnnealedLangevin(2, [0.5, -0.5]), ValueError, r"noise level.*-0\.5"),
        (lambda: AnnealedLangevin(2, [0.5], initial_std=0.0), ValueError, r"initial_std.*0\.0"),
        (
            lambda: ReverseSDE(VariancePreserving(event_shape=2), 3)(lambda t, x: x[:, :1], 4),
            FieldError,
            r"\(4, 1\).*\(4, 2\)",
        ),
        (
            lambda: ReverseSDE(VariancePreserving(event_shape=2), 3)(lambda t, x: x / 0, 4),
            SamplingError,
            "4 of 4 samples.*steps",
        ),
        (lambda: denoise(lambda t, x: -x, VariancePreserving(), torch.ones(2, 2), 0.0), SDEError, r"\(0, T\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()

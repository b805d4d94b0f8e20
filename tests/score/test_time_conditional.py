"""Objectives over an SDE: weightings, how times are drawn, and that none of it moves the expectation."""

import pytest
import torch
from gaussian_scores import Gaussian, SmoothScore
from test_objectives import within

from divflow.divergence import FieldError
from divflow.score import SDEError, SubVariancePreserving, VarianceExploding, VariancePreserving
from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
    TimeConditionalScoreMatching,
)
from divflow.score.objectives.time_conditional import WEIGHTINGS

SDES = {
    "vp": VariancePreserving(epsilon=0.05),
    "ve": VarianceExploding(0.5, 5.0, epsilon=0.1),
    "subvp": SubVariancePreserving(epsilon=0.2),
}


class TimeScore(SmoothScore):
    def forward(self, t, x):
        return super().forward(t, x) / (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)))


def losses(objective, score, x, seed):
    with torch.no_grad():
        return objective(score, x, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", SDES)
def test_how_times_are_drawn_does_not_move_the_mean(name, weighting):
    """Importance and stratification against the integral over a fine grid of times."""
    sde, x, score = SDES[name], Gaussian((3,)).sample(60_000), TimeScore((3,))
    plain = TimeConditionalScoreMatching(sde, weighting=weighting, stratified=False)
    grid = torch.linspace(sde.epsilon, sde.T, 60_001, dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    with torch.no_grad():
        at_all_times = plain(score, x, middle, torch.Generator().manual_seed(9)) * (sde.T - sde.epsilon)
    for stratified in (False, True):
        for importance in (False, True):
            objective = TimeConditionalScoreMatching(
                sde, weighting=weighting, stratified=stratified, importance=importance
            )
            assert within(losses(objective, score, x, 1) - at_all_times, 0.0)


@pytest.mark.parametrize("inner", [ImplicitScoreMatching(), SlicedScoreMatching(), FiniteDifferenceScoreMatching()])
@pytest.mark.parametrize("name", SDES)
def test_inner_objectives_differ_by_a_constant(name, inner):
    """The difference of two scores' losses agrees with that of denoising, for every inner objective."""
    x, a, b = Gaussian((2, 3)).sample(40_000), TimeScore((2, 3)), lambda t, x: -x
    denoising, other = (
        TimeConditionalScoreMatching(SDES[name], objective, "likelihood")
        for objective in (DenoisingScoreMatching(), inner)
    )
    by_denoising, by_other = (losses(o, a, x, 1) - losses(o, b, x, 1) for o in (denoising, other))
    assert by_other.mean().abs() > 10 * by_other.std() / 200
    assert within(by_denoising - by_other, 0.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_and_given_times(weighting):
    sde, x = SDES["vp"], torch.randn(5, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    weights = {"uniform": 1.0, "sigma2": sde.marginal(t).std ** 2, "likelihood": sde.diffusion(t) ** 2}[weighting]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    alpha, sigma = (value[:, None] for value in sde.marginal(t))
    expected = ((-(alpha * x + sigma * noise)) + noise / sigma).square().sum(dim=1) / 2 * weights
    objective = TimeConditionalScoreMatching(sde, weighting=weighting)
    torch.testing.assert_close(
        objective(lambda t, x: -x, x, t, torch.Generator().manual_seed(0)), expected, rtol=1e-12, atol=0
    )
    scalar = objective(lambda t, x: -x, x, 0.3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(scalar[1], expected[1])


@pytest.mark.parametrize("importance", [False, True])
def test_stratified_times_fill_the_interval_evenly(importance):
    """One in each of k equal parts of the distribution: the mean of k varies as k^-3/2, not as k^-1/2."""
    sde, x = VariancePreserving(), torch.empty(64, 2)

    def times(stratified):
        objective = TimeConditionalScoreMatching(
            sde, weighting="likelihood", stratified=stratified, importance=importance
        )
        return torch.stack([objective.draw_times(x, torch.Generator().manual_seed(i)).t.log() for i in range(400)])

    spread, loose = times(True), times(False)
    assert spread.mean(dim=1).std() < 0.2 * loose.mean(dim=1).std()
    assert abs(spread.mean() - loose.mean()) < 5 * loose.std() / 160
    assert spread.exp().min() >= sde.epsilon * 0.999
    assert spread.exp().max() <= sde.T


@pytest.mark.parametrize("importance", [False, True])
def test_every_row_of_a_batch_sees_all_times(importance):
    """Rows of a fixed order get no fixed share of the times: each one's mean loss is that of independent times."""
    x = torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)

    def rows(stratified):
        objective = TimeConditionalScoreMatching(
            VariancePreserving(epsilon=0.05), stratified=stratified, importance=importance
        )
        return torch.stack([losses(objective, lambda t, x: -x, x, seed) for seed in range(2_000)])

    spread, loose = rows(True), rows(False)
    assert within(spread - loose, 0.0)


def test_importance_follows_lambda_over_sigma_squared():
    """For the likelihood's weighting of VP that is d/dt log(e^B - 1): the distribution function in closed form."""
    sde = VariancePreserving()
    objective = TimeConditionalScoreMatching(sde, weighting="likelihood", importance=True)
    t = objective.draw_times(torch.empty(20_000, 2, dtype=torch.float64), torch.Generator().manual_seed(0)).t

    def primitive(t):
        alpha = sde.mean_scale(torch.as_tensor(t, dtype=torch.float64))
        return torch.log(alpha**-2 - 1)

    u = (primitive(t) - primitive(sde.epsilon)) / (primitive(1.0) - primitive(sde.epsilon))
    exact = (torch.arange(20_000) + 0.5) / 20_000
    assert (u.sort().values - exact).abs().max() < 1e-3


def test_importance_lowers_the_variance_of_denoising():
    """At the true score, with the likelihood's weighting: the reason to have it."""
    data, sde = Gaussian((3,)), VariancePreserving(epsilon=1e-4)
    x, score = data.sample(20_000), data.score(sde)
    plain, important = (
        losses(TimeConditionalScoreMatching(sde, weighting="likelihood", importance=importance), score, x, 1).var()
        for importance in (False, True)
    )
    assert important < 0.1 * plain


def test_loss_of_the_true_score_is_least():
    data, sde = Gaussian((3,)), VariancePreserving(epsilon=1e-2)
    x, truth = data.sample(20_000), data.score(sde)
    for inner in (DenoisingScoreMatching(), ImplicitScoreMatching()):
        objective = TimeConditionalScoreMatching(sde, inner, "likelihood")
        rows = []
        for i, part in enumerate(x.chunk(100)):
            truth.zero_grad()
            objective(truth, part, generator=torch.Generator().manual_seed(i)).mean().backward()
            rows.append(torch.cat([truth.values.grad, truth.mean.grad]))
        assert within(torch.stack(rows), 0.0)


def test_half_precision_and_empty_batches():
    objective = TimeConditionalScoreMatching(VariancePreserving(), importance=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        result = objective(lambda t, x: -x, torch.randn(300, 3, dtype=dtype))
        assert result.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.isfinite(result).all()
    assert objective(lambda t, x: -x, torch.empty(0, 3)).shape == (0,)
    assert objective(lambda t, x: -x, torch.randn(1, 3)).shape == (1,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, x: o(lambda t, x: -x, x, 0.0), SDEError, r"\(0, T\].*from 0 to 0.*epsilon"),
        (lambda o, x: o(lambda t, x: -x, x, -0.1), SDEError, r"\(0, T\].*-0\.1"),
        (lambda o, x: o(lambda t, x: -x, x, torch.tensor([0.1, 0.2, 1.1])), SDEError, r"\(0, T\].*0\.1 to 1\.1"),
        (lambda o, x: o(lambda t, x: -x, x, float("nan")), SDEError, "nan"),
        (lambda o, x: o(lambda t, x: -x, x.long()), FieldError, "int64"),
        (lambda o, x: o(lambda t, x: x[:1], x), FieldError, r"\(1, 2\).*\(3, 2\)"),
        (lambda o, x: TimeConditionalScoreMatching(o.sde, o), ValueError, "single time.*TimeConditional"),
        (lambda o, x: TimeConditionalScoreMatching(VariancePreserving), ValueError, "sde must be an SDE"),
        (lambda o, x: TimeConditionalScoreMatching(o.sde, weighting="g2"), ValueError, "likelihood.*'g2'"),
        (
            lambda o, x: TimeConditionalScoreMatching(o.sde, DenoisingScoreMatching(0.1)),
            ValueError,
            r"needs sigma=None.*sigma=0\.1",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(TimeConditionalScoreMatching(VariancePreserving()), torch.ones(3, 2))

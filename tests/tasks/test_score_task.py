"""ScoreTask in a user's own hands, and the stop at NaN that all tasks share."""

import functools

import pytest
import torch
from gaussian_scores import Gaussian, LinearScore
from lightning.pytorch.callbacks import ModelCheckpoint
from test_flow_task import as_it_is, trainer
from torch import nn
from torch.utils.data import DataLoader

from divflow.callbacks import LastCheckpoint
from divflow.divergence import FieldError
from divflow.flow.transforms import Affine, Compose, Logit
from divflow.networks import MLP
from divflow.score import (
    ScaledScore,
    ScoreDensity,
    SDEError,
    UnnormalizedDensity,
    VarianceExploding,
    VariancePreserving,
    probability_flow,
)
from divflow.score.objectives import DenoisingScoreMatching, ImplicitScoreMatching, TimeConditionalScoreMatching
from divflow.score.sampling import AnnealedLangevin, ReverseSDE
from divflow.tasks import ScoreTask, TrainingError


def loader(rows, batch_size=100):
    return DataLoader(rows, batch_size=batch_size, collate_fn=as_it_is)


def test_recovers_a_linear_score(tmp_path):
    data = Gaussian((3,))
    x = data.sample(4_000).float()
    score = LinearScore(torch.eye(3), torch.zeros(3))
    task = ScoreTask(score, ImplicitScoreMatching(), functools.partial(torch.optim.Adam, lr=0.05))
    run = trainer(tmp_path, max_epochs=20, limit_val_batches=0)
    run.fit(task, loader(x, 500), loader(torch.zeros(2, 2)))
    fitted = torch.linalg.inv(torch.cov(x.T))
    torch.testing.assert_close(score.precision, fitted, rtol=0.05, atol=0.1)
    torch.testing.assert_close(score.mean, x.mean(dim=0), rtol=0, atol=0.05)
    results = run.test(task, loader(data.sample(1_000, seed=2).float()), verbose=False)[0]
    assert set(results) == {"test/loss", "test/loss_standard_error"}  # no truth, no SDE: nothing else is known
    assert results["test/loss"] == pytest.approx(-torch.trace(fitted).item() / 2, abs=0.3)


def test_trains_over_an_sde_and_is_evaluated_by_its_likelihood(tmp_path):
    torch.manual_seed(0)
    rows = 0.5 * torch.randn(3_000, 2)
    sde = VariancePreserving(event_shape=2, epsilon=1e-3)
    score = ScaledScore(MLP(2, hidden=(32,), activation=nn.SiLU, zero_init=True), sde, data_std=0.65)
    objective = TimeConditionalScoreMatching(sde, weighting="likelihood", importance=True)
    # To a rate of zero: at a constant one the weights of the end wander, and the result is the seed's.
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=720)
    task = ScoreTask(score, objective, functools.partial(torch.optim.Adam, lr=0.02), cosine)
    run = trainer(tmp_path, max_epochs=60, limit_val_batches=0)
    untrained = run.test(task, loader(rows[:1_000], 500), verbose=False)[0]["test/nll"]
    run.fit(task, loader(rows, 250), loader(torch.zeros(2, 2)))
    results = run.test(task, loader(rows[:1_000], 500), verbose=False)[0]
    entropy = torch.distributions.Normal(0.0, 0.5).entropy().item() * 2
    assert untrained > entropy + 0.08  # of a normal density of standard deviation 0.65, 0.116 in expectation
    assert abs(results["test/nll"] - entropy) < 3 * results["test/nll_standard_error"] + 0.03
    assert {"test/nfe", "test/nfe_divergence", "test/quadrature_error", "test/loss_standard_error"} <= set(results)
    samples = task.evaluated_density.sample(4_000, generator=torch.Generator().manual_seed(0))
    assert samples.std() == pytest.approx(0.5, abs=0.05)


def test_validation_noise_is_the_same_each_time(tmp_path):
    task = ScoreTask(nn.Linear(2, 2), DenoisingScoreMatching(0.3))
    run, rows = trainer(tmp_path), loader(torch.randn(200, 2))
    first, second = (run.validate(task, rows, verbose=False)[0]["val/loss"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("sde", [None, VariancePreserving(event_shape=2, epsilon=1e-6)])
def test_scores_are_those_of_the_data(sde):
    """Through a transform: against the gradient of the log-density of the data, by finite differences."""
    truth = torch.distributions.Normal(0.4, 0.7)
    transform = Compose([Logit(0.1), Affine([0.1, -0.2], [0.9, 1.3])])

    def score(t, y):
        alpha, sigma = (1.0, 0.0) if sde is None else sde.marginal(t)
        return -(y - alpha * 0.4) / (alpha**2 * 0.49 + sigma**2)

    density = (
        UnnormalizedDensity(score, transform)
        if sde is None
        else ScoreDensity(probability_flow(score, sde).double(), transform)
    )
    x = torch.rand(5, 2, dtype=torch.float64)

    def log_prob(x):
        y, log_det = transform(x)
        return truth.log_prob(y).sum(dim=1) + log_det

    shift = 1e-5 * torch.eye(2, dtype=torch.float64)
    expected = torch.stack([(log_prob(x + s) - log_prob(x - s)) / 2e-5 for s in shift], dim=1)
    torch.testing.assert_close(density.double().score(x), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(density.score(x + 0), expected, rtol=1e-4, atol=1e-4)


def test_samplers_of_densities():
    sde, transform = VariancePreserving(event_shape=2), Affine(5.0, 0.1)
    flow = probability_flow(lambda t, x: -x, sde)
    for density in (
        ScoreDensity(flow, transform),
        ScoreDensity(flow, transform, ReverseSDE(sde, 50)),
        UnnormalizedDensity(lambda x: -x, transform, AnnealedLangevin(2, [1.0], 50)),
    ):
        samples = density.sample(2_000, generator=torch.Generator().manual_seed(0))
        assert samples.mean() == pytest.approx(5.0, abs=0.02)
        assert samples.std() == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="no sampler.*AnnealedLangevin"):
        UnnormalizedDensity(lambda x: -x, transform).sample(3)


def test_a_score_of_one_time_is_sampled_at_that_time():
    """A network that was trained at t = 0 never sees the sampler's levels; one of several levels does."""
    seen = []

    def score(t, x):
        seen.append(t.item())
        return -x

    sampler = AnnealedLangevin(2, [1.0, 0.5], 2)
    UnnormalizedDensity(score, Affine(), sampler).sample(3)
    assert seen == [0.0] * 4
    density = UnnormalizedDensity(score, Affine(), sampler, levels=[1.0, 0.5])
    density.sample(3)
    density.score(torch.ones(3, 2))
    assert seen[4:] == [1.0, 1.0, 0.5, 0.5, 0.5]
    task = ScoreTask(nn.Linear(2, 2), DenoisingScoreMatching([1.0, 0.5]))
    assert task.density.levels == (1.0, 0.5)


def test_a_score_that_mixes_the_batch_is_refused(tmp_path):
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(FieldError, match="BatchNorm1d"):
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(
            ScoreTask(network, ImplicitScoreMatching()), loader(torch.randn(8, 2), 4), loader(torch.zeros(2, 2))
        )


def test_a_nan_stops_training_and_names_step_batch_and_checkpoint(tmp_path):
    """The third batch is poisoned: weights and last.ckpt stay those after the second step."""
    rows = torch.randn(40, 2)
    rows[25] = float("nan")
    task = ScoreTask(MLP(2, hidden=(4,)), DenoisingScoreMatching(0.5))
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.callbacks.append(LastCheckpoint(tmp_path, every_n_steps=1))
    with pytest.raises(TrainingError, match=r"loss is nan at step 2 .*batch 2\).*last good checkpoint is .*last\.ckpt"):
        run.fit(task, loader(rows, 10), loader(torch.zeros(2, 2)))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    class Kink(nn.Module):
        """|w| at w = 0 by way of a square root: a finite value whose gradient is infinite."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, t, x):
            return -x * (1 + self.w.square().sqrt())

    score = Kink()
    task = ScoreTask(score, DenoisingScoreMatching(0.5))
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    with pytest.raises(TrainingError, match="gradient is nan at step 0.*batch 0.*no checkpoint yet"):
        run.fit(task, loader(torch.randn(20, 2), 10), loader(torch.zeros(2, 2)))
    assert torch.equal(score.w, torch.zeros(2))


def test_lightnings_own_checkpoint_is_named(tmp_path):
    rows = torch.randn(40, 2)
    rows[25] = float("nan")
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.callbacks.append(ModelCheckpoint(tmp_path, filename="mine", every_n_train_steps=1))
    with pytest.raises(TrainingError, match=r"last good checkpoint is .*mine\.ckpt"):
        run.fit(ScoreTask(nn.Linear(2, 2), DenoisingScoreMatching(0.5)), loader(rows, 10), loader(torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ScoreTask(nn.Linear(2, 2), TimeConditionalScoreMatching(VariancePreserving())),
            SDEError,
            "no event shape",
        ),
        (
            lambda: ScoreTask(
                UnnormalizedDensity(nn.Linear(2, 2), Affine()), TimeConditionalScoreMatching(VariancePreserving())
            ),
            ValueError,
            "TimeConditionalScoreMatching can't train a UnnormalizedDensity",
        ),
        (
            lambda: ScoreDensity(
                probability_flow(nn.Linear(2, 2), VariancePreserving(event_shape=2)),
                Affine(),
                ReverseSDE(VarianceExploding(event_shape=2)),
            ),
            ValueError,
            "over VariancePreserving.*sampler over VarianceExploding",
        ),
        (
            lambda: ScoreTask(
                ScoreDensity(probability_flow(nn.Linear(2, 2), VariancePreserving(event_shape=2)), Affine()),
                TimeConditionalScoreMatching(VarianceExploding(event_shape=2)),
            ),
            ValueError,
            "over VariancePreserving.*objective is over VarianceExploding",
        ),
        (
            lambda: UnnormalizedDensity(nn.Linear(2, 2), Affine(), AnnealedLangevin(2, [1.0, 0.3]), [1.0, 0.1]),
            ValueError,
            r"levels \(1\.0, 0\.1\).*\(1\.0, 0\.3\)",
        ),
        (
            lambda: ScoreTask(
                ScoreDensity(probability_flow(nn.Linear(2, 2), VariancePreserving(event_shape=2)), Affine()),
                ImplicitScoreMatching(),
            ),
            ValueError,
            "ImplicitScoreMatching can't train a ScoreDensity",
        ),
        (
            lambda: ScoreTask(
                nn.Linear(2, 2),
                ImplicitScoreMatching(),
                evaluation=probability_flow(nn.Linear(2, 2), VariancePreserving(event_shape=2)),
            ),
            ValueError,
            "evaluation must be None.*Leave it out",
        ),
        (
            lambda: ScoreDensity(
                probability_flow(nn.Linear(2, 2), VariancePreserving(event_shape=2)),
                Affine(),
                AnnealedLangevin(2, [0.1]),
            ),
            ValueError,
            "over VariancePreserving.*sampler over None",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()

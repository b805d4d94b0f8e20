"""Samples that count more than others: in the loss, in validation and test, and in their standard errors."""

import functools

import lightning as L
import numpy as np
import pytest
import torch
from run import FAST, config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from divflow.cli import main
from divflow.data.batch import DataError
from divflow.data.table import Table
from divflow.errors import FieldError
from divflow.flow import ContinuousFlow
from divflow.runs.experiment import train
from divflow.score.objectives import ImplicitScoreMatching
from divflow.solver import Solver
from divflow.tasks import FlowMatchingTask, FlowTask, ScoreTask
from divflow.tasks.metrics import MeanWithStandardError

X, W = (
    torch.randn(50, 1, generator=torch.Generator().manual_seed(0)),
    torch.rand(50, generator=torch.Generator().manual_seed(1)),
)
KEYS = {"x": 0, "weight": 1}


class Shift(nn.Module):
    """v = m, whose flow is N(m, 1); as a score, m - x."""

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(1))

    def forward(self, t, x):
        return self.m.expand_as(x)


class Score(Shift):
    def forward(self, t, x):
        return self.m - x


def fit(task, rows=(X, W), **options):
    loader = DataLoader(TensorDataset(*rows), batch_size=50)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **{"max_epochs": 1} | options,
    )
    trainer.fit(task, loader, loader)
    return trainer, loader


SGD = functools.partial(torch.optim.SGD, lr=1.0)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_one_step_of_the_size_of_the_gradient_reaches_the_weighted_mean(scale):
    """The likelihood of N(m, 1) is |x - m|^2 / 2, whose weighted gradient is m - sum w x / sum w, whatever the size of the weights."""
    velocity = Shift()
    fit(
        FlowTask(ContinuousFlow(velocity, 1, solver=Solver("euler", options={"step_size": 0.5})), SGD, keys=KEYS),
        (X, scale * W),
    )
    torch.testing.assert_close(velocity.m.detach(), (W @ X) / W.sum(), rtol=1e-5, atol=1e-6)


def test_score_matching_and_flow_matching_are_weighted_too():
    score = Score()
    fit(ScoreTask(score, ImplicitScoreMatching(), SGD, keys=KEYS))
    torch.testing.assert_close(score.m.detach(), (W @ X) / W.sum(), rtol=1e-5, atol=1e-6)
    velocity = Shift()
    task = FlowMatchingTask(
        ContinuousFlow(velocity, 1), draws=64, optimizer=functools.partial(torch.optim.SGD, lr=0.5), keys=KEYS
    )
    fit(task)  # of x - z, whose weighted mean is that of x up to the mean of noise
    assert abs(velocity.m.item() - ((W @ X) / W.sum()).item()) < 0.08
    assert abs(velocity.m.item() - X.mean().item()) > 0.005


def test_validation_and_test_average_by_weight():
    velocity = Shift()
    task = FlowTask(ContinuousFlow(velocity, 1, solver=Solver("euler", options={"step_size": 0.5})), SGD, keys=KEYS)
    trainer, _ = fit(task, max_steps=1)
    found = trainer.test(task, DataLoader(TensorDataset(X, W), batch_size=16), verbose=False)[0]
    nll = ((X - velocity.m.detach()) ** 2).sum(dim=1) / 2 + 0.5 * np.log(2 * np.pi)
    mean = (W * nll).sum() / W.sum()
    error = (50 / 49 * (W**2 * (nll - mean) ** 2).sum()).sqrt() / W.sum()
    assert found["test/nll"] == pytest.approx(mean.item(), rel=1e-5)
    assert found["test/nll_standard_error"] == pytest.approx(error.item(), rel=1e-4)


def test_weights_that_are_none_end_a_run_with_their_row():
    for weights, message in ((W - 2, "row 0 of 50"), (0 * W, "all zero")):
        with pytest.raises(DataError, match=message):
            fit(FlowTask(ContinuousFlow(Shift(), 1), SGD, keys=KEYS), (X, weights))


def test_a_third_tensor_is_not_left_out():
    with pytest.raises(DataError, match="list of 3"):
        fit(FlowTask(ContinuousFlow(Shift(), 1), SGD), (X, X, W))


@pytest.mark.parametrize("task", [FlowTask, FlowMatchingTask])
def test_labels_that_a_velocity_does_not_take_are_reported(task):
    with pytest.raises(FieldError, match=r"v\(t, x, context\), but the batches have a context.*keys=\{'x': 0\}"):
        fit(task(ContinuousFlow(Shift(), 1)), (X, W))
    fit(task(ContinuousFlow(Shift(), 1), keys={"x": 0}), (X, W))


def test_equal_weights_change_nothing():
    values, plain, equal = torch.randn(100) * 3 + 1000, MeanWithStandardError(), MeanWithStandardError()
    for part in values.split(30):
        plain.update(part)
        equal.update(part, torch.full_like(part, 0.3))
    torch.testing.assert_close(plain.compute(), equal.compute(), rtol=1e-6, atol=0)
    assert plain.compute().standard_error == pytest.approx(float(values.std() / 10), rel=1e-5)


def test_the_standard_error_is_that_of_repeated_draws():
    """Weights and values that depend on one another, 250 times 200 of them, and rows that do not count."""
    noise = np.random.default_rng(0)
    x = noise.normal(size=(250, 200))
    w = np.exp(x / 2) * (noise.random((250, 200)) < 0.7)
    means, errors = [], []
    for values, weights in zip(torch.as_tensor(x), torch.as_tensor(w), strict=True):
        metric = MeanWithStandardError()
        metric.update(values, weights)
        found = metric.compute()
        means.append(found.mean.item())
        errors.append(found.standard_error.item())
    assert np.mean(means) == pytest.approx(0.5, abs=0.02)  # E[e^(x/2) x] / E[e^(x/2)]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_what_variances_leave_in_a_weighted_mean():
    metric, variances = MeanWithStandardError(), torch.rand(50)
    metric.update(variances, W)
    assert metric.compute().root == pytest.approx(float((W**2 * variances).sum().sqrt() / W.sum()), rel=1e-5)


@pytest.fixture
def table(tmp_path):
    noise = np.random.default_rng(0)
    path = tmp_path / "survey.csv"
    rows = np.column_stack([noise.normal(size=(300, 2)), noise.random(300).round(3)])
    np.savetxt(path, rows, delimiter=",", header="a,b,w", comments="")
    return path


def test_a_column_of_a_table_weighs_its_rows(table):
    data = Table(table, weight="w")
    assert (data.columns, data.event_shape) == (["a", "b"], (2,))
    x, context, weight = next(iter(data.val_dataloader()))
    assert (x.shape[1:], context, weight.shape) == ((2,), None, x.shape[:1])
    given = next(iter(Table(table, context="b", weight="w").val_dataloader()))
    assert (given.x.shape[1], given.context.shape[1]) == (1, 1)
    assert torch.equal(given.weight, weight)


@pytest.mark.slow
def test_a_run_on_weighted_rows_and_its_evaluation(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(config(*FAST, "data=table", f"data.path={table}", "data.weight=w", f"output_dir={tmp_path}/run"))
    capsys.readouterr()
    main(["evaluate", "ckpt_path=run/checkpoints/best.ckpt", "split=all"])
    nll = -np.loadtxt("log_prob.csv", delimiter=",", skiprows=1)[:, 0]
    w = np.loadtxt(table, delimiter=",", skiprows=1)[:, 2]
    assert f"{np.average(nll, weights=w):.4f} ±" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: rows.replace("a,b,w", "a,b,v"), {}, "weight is of column w|no column w"),
        (lambda rows: rows + "0.1,0.2,-3\n", {}, "weight column w has -3 in row 300"),
        (lambda rows: rows, {"context": ["w"]}, "weight is of column w"),
    ],
)
def test_a_column_that_weighs_nothing_is_refused(table, change, options, message):
    table.write_text(change(table.read_text()))
    with pytest.raises(DataError, match=message):
        Table(table, weight="w", **options)

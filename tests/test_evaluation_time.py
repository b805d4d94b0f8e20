"""What an evaluation takes is said before it begins; one that takes too long ends, typed, with nothing lost."""

import itertools
import time

import pytest
import torch
from hydra.errors import InstantiationException
from run import FAST, SMALL_TOY, config
from torch import nn

from divflow.cli import main
from divflow.divergence import Autograd, Exact, Hutchinson
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow, cost, evaluation_time
from divflow.flow.cost import evaluation_cost
from divflow.flow.evaluation_time import EvaluationTimeError
from divflow.likelihood import Quadrature
from divflow.operators.progress import report, watched
from divflow.runs.experiment import train
from divflow.solver import Solver

X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """A velocity without closed form, of which each evaluation takes a while once it is asked to."""

    pause = 0.0

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t, x):
        time.sleep(Slow.pause)
        return self.net(x).sort(dim=1).values * t.reshape(-1, 1).cos()


def run(folder, *overrides, pause=0.0):
    network = ["network=custom", f"network._target_={__name__}.Slow"]
    fast = [override for override in FAST if not override.startswith("network")]
    Slow.pause = pause
    try:
        return train(config(*fast, *SMALL_TOY, *network, f"output_dir={folder}", *overrides))
    finally:
        Slow.pause = 0.0


@pytest.mark.parametrize("estimator", [Autograd(), Exact("reverse"), Hutchinson(2)])
@pytest.mark.parametrize("likelihood", [Quadrature(15), Quadrature(tolerance=1e-3)])
def test_evaluations_are_those_that_happen(estimator, likelihood, monkeypatch):
    """With a second for the velocity and, where it is timed, for a divergence: what the plan says, times what the counters say."""
    monkeypatch.setattr(cost, "_seconds", lambda evaluate, x: 1.0)
    flow = ContinuousFlow(
        lambda t, x: -x * (1 + t), 40, estimator=estimator, likelihood=likelihood, solver=Solver("dopri5")
    )
    found, happened = evaluation_cost(flow, X), flow.evaluate(X).evaluations
    passes = 1 if isinstance(estimator, Hutchinson) else 41
    assert found.divergences == 2 * happened.divergence
    solved = happened.forward + happened.diagnostics - happened.divergence
    assert found.seconds == solved + passes * found.divergences
    assert found.passes == (None if passes == 1 else passes)


def test_what_takes_a_moment_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(cost, "_seconds", lambda evaluate, x: 0.001)
    flow = ContinuousFlow(lambda t, x: -x, 40)
    assert evaluation_cost(flow, X, least=60.0) is None
    assert evaluation_cost(flow, X, least=1.0) is not None


def test_a_validation_that_would_take_too_long_is_refused_before_the_first_step(tmp_path):
    """20 rows in one batch, some 60 evaluations of the velocity a validation, half a second each."""
    message = r"each validation will take some .*20 rows in batches of 20.*The limit is evaluation.max_minutes=0.01"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_time, "_SAID", 0.5)
        with pytest.raises(EvaluationTimeError, match=message):
            run(tmp_path, "evaluation.max_minutes=0.01", pause=0.02)
    assert not (tmp_path / "checkpoints").exists()


def test_it_is_reported_where_it_is_allowed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation_time, "_SAID", 0.5)
    run(tmp_path, "trainer.max_steps=1", "trainer.val_check_interval=1", pause=0.01)
    printed = capsys.readouterr().out
    rows = {"each validation": "20 rows in batches of 20", "the test": "30 rows in batches of 30"}
    for what, evaluated in rows.items():
        said = f"{what} will take some 0 minutes: {evaluated}, each with 14 divergences by Exact("
        assert printed.count(said) == 1


def test_a_test_that_takes_too_long_ends_with_what_was_trained(tmp_path, monkeypatch, capsys):
    # The first evaluation takes some seconds, by a clock that is looked at more often the more there is.
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(evaluation_time.time, "monotonic", lambda: next(clock))
    with pytest.raises(EvaluationTimeError, match=r"the test has taken more than evaluation.max_minutes=0.5"):
        run(tmp_path, "data.num_test=3000", "data.eval_batch_size=200", "evaluation.max_minutes=0.5")
    assert f"stopped in the test, after 4 steps; go on with ckpt_path={tmp_path}" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize("limit", ["0", "-1", "abc"])
def test_a_limit_is_a_positive_number(tmp_path, limit, monkeypatch):
    with pytest.raises((DivflowError, InstantiationException), match="max_minutes"):
        run(tmp_path, f"evaluation.max_minutes={limit}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.ckpt").touch()
    with pytest.raises(SystemExit, match=f"max_minutes must be a positive number.*{limit}"):
        main(["evaluate", "ckpt_path=none.ckpt", f"max_minutes={limit}"])


def test_who_watches_may_stop_watching_in_any_order():
    seen = []
    first, second = watched(lambda *part: seen.append((1, *part))), watched(lambda *part: seen.append((2, *part)))
    first.__enter__()
    second.__enter__()
    report("nodes", 1, 3)
    first.__exit__(None, None, None)
    report("nodes", 2, 3)
    second.__exit__(None, None, None)
    report("nodes", 3, 3)
    assert seen == [(1, "nodes", 1, 3), (2, "nodes", 1, 3), (2, "nodes", 2, 3)]


@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_products_are_reported(method):
    seen = []
    with watched(lambda *part: seen.append(part)):
        Exact(method, chunk_size=15)(lambda t, x: x.cumsum(1).sin(), 0.0, X)
    assert seen == [("products", 15, 40), ("products", 30, 40), ("products", 40, 40)]

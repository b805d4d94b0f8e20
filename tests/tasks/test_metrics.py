"""Means of what is evaluated, the errors beside them, and a warning where one of these is not in the other."""

import math
import warnings

import pytest
import torch
from run import FAST, SMALL_TOY, run_here

from divflow.cli import main
from divflow.tasks.metrics import MeanWithStandardError, QuadratureWarning, summarized, warn_of_quadrature


def averages(**values):
    found = {name: MeanWithStandardError() for name in values}
    for name, metric in found.items():
        metric.update(torch.as_tensor(values[name]))
    return found


def test_over_batches_of_any_size():
    values, metric = torch.randn(100) * 3 + 1000, MeanWithStandardError()
    for batch in values.split([1, 50, 7, 42]):
        metric.update(batch)
    mean, error, _ = metric.compute()
    torch.testing.assert_close(mean, values.mean())
    torch.testing.assert_close(error, values.std() / math.sqrt(100), rtol=1e-4, atol=0)


def test_a_quadrature_error_is_reported_in_units_of_the_result():
    known = averages(nll=[1.0, 3.0], bits_per_dim=[0.5, 1.5], quadrature_error=[20.0, 40.0])
    found = summarized(known, 60.0, errors=True)
    assert found["quadrature_error"] == 30
    assert found["bits_per_dim_quadrature_error"] == 0.5
    assert "quadrature_error_standard_error" not in found
    assert "bits_per_dim_quadrature_error" not in summarized(known, 60.0, errors=False)
    assert "bits_per_dim_quadrature_error" not in summarized(known, None, errors=True)


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        ({"nll": [1.0, 3.0], "quadrature_error": [2.0, 0.5]}, None, r"nll, 2\.0000 ± 1\.0000 nats, may be off by another 1\.2 nats.*Use care"),
        ({"nll": [1.0, 3.0], "quadrature_error": [math.inf, 0.5]}, None, "another inf nats"),
        ({"nll": [1.0, 3.0], "quadrature_error": [0.9, 0.9]}, None, None),
        ({"nll": [1.0, 3.0], "gap": [0.1, 0.2], "quadrature_error": [0.9, 0.9]}, None, "gap, 0.1500 ± 0.0500 nats.*another 0.9"),
        ({"nll": [100.0, 300.0], "bits_per_dim": [1.0, 1.2], "quadrature_error": [90.0, 90.0]}, 500.0, r"bits_per_dim.*0\.18 bits/dim"),
        ({"nll": [100.0, 300.0], "bits_per_dim": [1.0, 1.2], "quadrature_error": [40.0, 40.0]}, 500.0, None),
        ({"nll": [1.0], "quadrature_error": [9.0]}, None, None),
        ({"nll": [1.0, 1.0], "quadrature_error": [1e-5, 1e-5]}, None, None),
        ({"nll": [1.0, 3.0]}, None, None),
        ({"loss": [1.0, 3.0]}, None, None),
    ],
)  # fmt: skip
def test_an_error_that_is_more_than_the_one_beside_it_is_warned_of(values, unit, message):
    found = summarized(averages(**values), unit, errors=True)
    if message is not None:
        with pytest.warns(QuadratureWarning, match=message):
            warn_of_quadrature(found, "care")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_quadrature(found, "care")


@pytest.mark.filterwarnings("ignore::divflow.flow.units.UnitsWarning")
def test_by_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    coarse = ["solver@evaluation.solver=euler", "evaluation.solver.options.step_size=0.5"]
    fast = [it for it in FAST if "evaluation.solver" not in it]
    untrained = ["network.zero_init=false", "task.optimizer.lr=1.0", "output_dir=run"]
    with pytest.warns(QuadratureWarning, match=r"Use a smaller evaluation\.likelihood\.tolerance"):
        run_here(*fast, *SMALL_TOY, *coarse, *untrained)
    with pytest.warns(QuadratureWarning, match=r"Use likelihood=quadrature_tight.*solver\.rtol"):
        main(["evaluate", "ckpt_path=run/checkpoints/best.ckpt"])
    assert capsys.readouterr().out.count("beside that ±, quadrature error") == 2
    main(
        [
            "evaluate",
            "ckpt_path=run/checkpoints/best.ckpt",
            "likelihood=quadrature_tight",
            "solver=adaptive",
            "overwrite=true",
        ]
    )

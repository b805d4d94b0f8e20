"""A simulator of one's own: what it is given and what it may return, and posteriors by the commands."""

import numpy as np
import pytest
import torch
from run import FAST, run_here
from torch.distributions import Independent, Normal

from divflow.cli import main
from divflow.data import DataError, Simulator


def doubled(parameters):
    """As many write theirs: numpy, with numpy's global generator."""
    return parameters.numpy() * 2 + 0.1 * np.random.standard_normal(parameters.shape)  # noqa: NPY002


def seeded(parameters, generator):
    return parameters + torch.randn(parameters.shape, generator=generator)


@pytest.mark.parametrize("simulate", [doubled, seeded])
def test_simulations_are_a_function_of_the_seed_alone(simulate):
    prior = {"mass": (1, 2), "rate": [0, 3]}
    first = Simulator(simulate, prior, 100, 20)
    doubled(torch.rand(3))
    before = torch.get_rng_state()
    again, other = Simulator(simulate, prior, 100, 20), Simulator(simulate, prior, 100, 20, seed=1)
    assert torch.equal(first.train.context, again.train.context)
    assert torch.equal(first.test.rows, again.test.rows)
    assert not torch.equal(first.test.rows, other.test.rows)
    assert not torch.equal(first.train.context[:20], first.test.context)
    assert first.columns == ["mass", "rate"]
    rows = first.train.rows
    assert (rows >= torch.tensor([1.0, 0.0])).all()
    assert (rows <= torch.tensor([2.0, 3.0])).all()
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own goes on as if nothing had been drawn


def test_a_prior_is_a_distribution_too_and_simulations_have_any_shape():
    data = Simulator(
        lambda p: p[:, None, :].expand(-1, 3, 2) + 0.1, Independent(Normal(torch.zeros(2), 1.0), 1), 100, 20
    )
    x, context = data.test.__getitems__([0, 1])
    torch.testing.assert_close(context, x.repeat(1, 3) + 0.1)
    assert (data.context_features, data.columns) == (6, ["parameter_1", "parameter_2"])


WRONG = {
    "rows": (lambda p: p[:3], r"\(120, \.\.\.\) for 120 parameters, but returned shape \(3, 1\)"),
    "a string": (lambda p: "x", "returned a str"),
    "nothing": (lambda p: None, "returned a NoneType"),
    "NaN": (lambda p: (p - 0.5).log(), r"of 120 simulations are not finite, such as that of the parameters \[0\."),
    "constant": (lambda p: p * 0, "the simulations' entry 1 is constant"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_simulations_that_are_none(kind):
    simulate, message = WRONG[kind]
    with pytest.raises(DataError, match=message):
        Simulator(simulate, [[0, 1]], 100, 20)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (3, "prior must be ranges.*but is 3"),
        ("ab", "prior must be ranges.*but is 'ab'"),
        ([], "prior must be ranges"),
        ([[1, 0]], r"prior of parameter_1 must be a range.*\[1, 0\]"),
        ({"mass": "12"}, "prior of mass must be a range.*'12'"),
        (Normal(0.0, 1.0), "distribution of finite vectors"),
    ],
)
def test_priors_that_are_none(prior, message):
    with pytest.raises(DataError, match=message):
        Simulator(doubled, prior, 100, 20)


@pytest.mark.slow
def test_a_posterior_by_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_simulator.py").write_text(
        "import numpy as np\ndef simulate(p):\n    return p.numpy() * 2 + 0.1 * np.random.standard_normal(p.shape)\n"
    )
    data = ["data=simulator", "data.simulate._target_=own_simulator.simulate", "data.prior={mass: [1, 2]}"]
    run_here(*FAST, *data, "data.num_simulations=100", "data.num_test=20", "output_dir=run")
    best = "ckpt_path=run/checkpoints/best.ckpt"
    with pytest.raises(SystemExit, match=r"own_simulator\.simulate.*allow=\[own_simulator\.simulate\]"):
        main(["evaluate", best])
    main(["evaluate", best, "allow=own_simulator.simulate", "out=a.npy"])
    assert np.load("a.npy").shape[0] == 20
    main(["sample", best, "context={observation_1: 3.1}", "num_samples=5", "out=s.csv"])
    assert (tmp_path / "s.csv").read_text().startswith("mass\n")

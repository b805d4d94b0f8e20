"""Simulators against their closed forms, and against the posteriors that sbibm ships; conditional runs of the real configs."""

import copy
import importlib.util
import math

import numpy as np
import pytest
import torch
from run import DRAWN, FAST, config
from scipy.stats import kstest

import divflow
from divflow.cli import main
from divflow.data import DataError, Simulations
from divflow.data.simulations import slcp, two_moons
from divflow.divergence import FieldError
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError
from divflow.saved.checkpoint import init_weights
from divflow.tasks import TrainingError

SMALL = ["data=simulations", "data.num_simulations=60", "data.num_test=20", "data.batch_size=16"]
needs_sbibm = pytest.mark.skipif(importlib.util.find_spec("sbibm") is None, reason="sbibm is not installed")


def test_slcp_has_the_moments_of_its_likelihood():
    parameters = torch.tensor([[1.0, -2.0, 1.2, -0.7, 0.8]])
    x = slcp(parameters.expand(40_000, 5), torch.Generator().manual_seed(0)).view(-1, 4, 2)
    s1, s2, rho = 1.44, 0.49, math.tanh(0.8)
    expected = torch.tensor([[s1**2, rho * s1 * s2], [rho * s1 * s2, s2**2]])
    torch.testing.assert_close(x.mean(dim=(0, 1)), parameters[0, :2], atol=0.01, rtol=0)
    torch.testing.assert_close(x.flatten(0, 1).T.cov(), expected, atol=0.02, rtol=0.01)
    across = (x[:, 0, 0] - 1) * (x[:, 1, 0] - 1)  # the four draws are independent
    assert abs(across.mean()) < 4 * across.std() / 200


def test_two_moons_is_a_crescent_moved():
    parameters = torch.tensor([[0.3, 0.5]])
    x = two_moons(parameters.expand(10_000, 2), torch.Generator().manual_seed(0))
    moved = x - torch.tensor([0.25 - 0.8 / math.sqrt(2), 0.2 / math.sqrt(2)])
    assert kstest(((moved.norm(dim=1) - 0.1) / 0.01).numpy(), "norm").pvalue > 1e-3
    assert moved[:, 0].min() > -0.01
    assert kstest((torch.atan2(moved[:, 1], moved[:, 0]) / math.pi + 0.5).numpy(), "uniform").pvalue > 1e-3


@needs_sbibm
@pytest.mark.parametrize("number", [1, 3])
def test_published_posteriors_of_two_moons_are_those_of_its_simulator(number):
    """Given the observation, the radius that each sample implies has its prior; the box cuts none of these two."""
    data = Simulations("two_moons")
    samples, x = data.reference(number), data._read(number, "observation.csv")
    assert samples.shape == (10_000, 2)
    assert samples.abs().max() < 0.9
    centre = two_moons(samples, torch.Generator().manual_seed(0)) - _crescent()
    radius = (x - centre).norm(dim=1)
    assert abs(radius.mean() - 0.1) < 0.001
    assert abs(radius.std() - 0.01) < 0.001


def _crescent():
    zero = torch.zeros(10_000, 2)
    return two_moons(zero, torch.Generator().manual_seed(0)) - torch.tensor([0.25, 0.0])


@needs_sbibm
def test_published_posterior_of_slcp_explains_its_observation():
    """The mean log-likelihood of the samples is within a nat for each parameter of the best one's, as of a posterior."""
    data = Simulations("slcp")
    samples, x = data.reference(2), data._read(2, "observation.csv").view(1, 4, 2)
    mean, deviations, rho = samples[:, None, :2], samples[:, None, 2:4].square(), samples[:, 4, None].tanh()
    a, b = ((x - mean) / deviations).unbind(dim=2)
    quadratic = (a.square() - 2 * rho * a * b + b.square()) / (1 - rho.square())
    log_det = deviations.log().sum(dim=2) + (1 - rho.square()).log() / 2
    log_likelihood = -(quadratic / 2 + log_det).sum(dim=1)
    assert log_likelihood.max() - log_likelihood.mean() < 5
    assert torch.equal(x.flatten(), data.observation(2))


def test_contexts_are_those_of_their_parameters():
    data = Simulations("slcp", num_simulations=2_000)
    for split in (data.train, data.val, data.test):
        simulations = split.context.view(-1, 4, 2)
        pulls = (simulations.mean(dim=1) - split.rows[:, :2]) / (split.rows[:, 2:4].square() / 2)
        assert kstest(pulls[:, 0].numpy(), "norm").pvalue > 1e-3
    assert len(data.train) + len(data.val) == 2_000


@pytest.mark.parametrize("task", ["flow", pytest.param("flow_matching", marks=pytest.mark.slow)])
def test_conditional_flows_train_are_evaluated_and_come_back(tmp_path, monkeypatch, task):
    results = train(config(f"task={task}", *SMALL, *DRAWN, f"output_dir={tmp_path}"))
    density = divflow.load(tmp_path / "checkpoints" / "best.ckpt")
    data = Simulations("two_moons", 60, 20)
    x, context = data.test.__getitems__(list(range(20)))
    assert -density.log_prob(x, context).mean().item() == pytest.approx(results["test/nll"], abs=1e-4)
    assert not torch.equal(density.log_prob(x, context), density.log_prob(x, context.flip(0)))
    assert density.sample(20, context).shape == (20, 2)
    with pytest.raises(FieldError, match=r"tensor \(k, 2\).*of shape \(20, 1\)"):  # which would broadcast
        density.log_prob(x, context[:, :1])
    assert (tmp_path / "figures" / "final.png").is_file()
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "ckpt_path=checkpoints/best.ckpt", "out=evaluated.npy", "batch_size=7"])
    np.testing.assert_allclose(np.load("evaluated.npy")[:, 0], density.log_prob(x, context).detach(), atol=1e-4)
    for given, message in {
        "null": r"conditional, but no context was given\. Give a list of 2 numbers",
        "[0.1]": r"tensor \(k, 2\).*of shape \(1000, 1\)",
        "[0.1,a]": r"list of 2 numbers.*'a'",
        "0.1": "list of 2 numbers",
        "[0.1,nan]": "list of 2 numbers.*nan",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main(["sample", "ckpt_path=checkpoints/best.ckpt", f"context={given}"])
    with pytest.raises(SystemExit, match=r"samples of one context beside data of all"):
        main(["sample", "ckpt_path=checkpoints/best.ckpt", "context=[0.1,-0.3]", "out=drawn.png"])
    main(
        [
            "sample",
            "ckpt_path=checkpoints/best.ckpt",
            "context=[0.1,-0.3]",
            "num_samples=7",
            "batch_size=4",
            "out=drawn.npy",
        ]
    )
    z = density.flow.base.sample(7, torch.Generator().manual_seed(0))
    given = density.flow_context(torch.tensor([[0.1, -0.3]]).expand(7, -1))
    expected = density.transform.inverse(density.flow.decode(z, given)).detach()
    np.testing.assert_allclose(np.load("drawn.npy"), expected, atol=1e-4)


def test_contexts_are_in_their_own_units(tmp_path):
    """A density that is loaded back standardizes them as its training did, whatever simulations there are then."""
    train(config("task=flow_matching", *SMALL, *FAST, f"output_dir={tmp_path}"))
    density, data = divflow.load(tmp_path / "checkpoints" / "best.ckpt"), Simulations("two_moons", 60, 20)
    context = two_moons(torch.tensor([[0.3, 0.5], [-0.4, 0.1]]), torch.Generator().manual_seed(0))
    x = torch.zeros(2, 2)
    seen = data.train.context
    standardized = (context - seen.mean(dim=0)) / seen.std(dim=0)
    expected = density.flow.log_prob(density.transform(x)[0], standardized) + density.transform(x)[1]
    torch.testing.assert_close(density.log_prob(x, context), expected)
    checkpoint, said = tmp_path / "checkpoints" / "best.ckpt", "is not that of these data"
    assert said not in init_weights(copy.deepcopy(density), checkpoint)
    other = copy.deepcopy(density)
    other.context_transform.shift += 1
    assert said in init_weights(other, checkpoint)
    raw = two_moons(torch.zeros(1, 2)).expand(5, -1)
    found = density.importance_weights(lambda x: -x.square().sum(dim=1), 5, context=raw)
    assert found.samples.shape == (5, 2)


def test_what_takes_no_context_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"scores take no context.*task=flow"):
        train(config("task=score", *SMALL, *FAST, f"output_dir={tmp_path}"))
    fast = [setting for setting in FAST if "hidden" not in setting]
    with pytest.raises(
        ConfigError, match=r"context of 2 features, but .*HollowMLP takes no\s+context_features\. Use network=mlp"
    ):
        train(config(*SMALL, *fast, "network=hollow_mlp", f"output_dir={tmp_path}/other"))


def test_what_is_not_there_is_named(monkeypatch):
    with pytest.raises(
        DataError, match=r"data\.name must be one of two_moons, slcp, but there is no simulator 'gaussian'"
    ):
        Simulations("gaussian")
    with pytest.raises(DataError, match=r"at least 20 .* but they are 10 and 2000"):
        Simulations("slcp", num_simulations=10)
    data = Simulations("slcp", 100)
    with pytest.raises(DataError, match="from 1 to 10, but is 11"):
        data.reference(11)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"sbibm, which is not installed.*: pip install --no-deps sbibm"):
        data.observation(1)

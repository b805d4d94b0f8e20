"""Whole runs on particles: trained either way, evaluated by weighted samples, loaded back; and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from covering import alternated
from matplotlib.figure import Figure
from run import DRAWN, config
from torch import Generator

import divflow
from divflow.callbacks import figures
from divflow.callbacks.plots import plot_energies
from divflow.cli import main
from divflow.data import MeanFreeScale, Particles
from divflow.distributions import BaseError, MeanFreeNormal
from divflow.divergence import Hutchinson
from divflow.energies import DoubleWell, Tempering
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.importance import ImportanceError, ImportanceWarning
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError
from divflow.tasks.reweighting import reweighted

SAMPLES = ["data.num_train=64", "data.num_val=20", "data.num_test=30", "data.num_weighted=40", "data.batch_size=16"]
SAMPLER = ["data.sampler.chains=20", "data.sampler.warm_up=60", "data.sampler.thin=1"]
SMALL = [
    *SAMPLES,
    *SAMPLER,
    "data.eval_batch_size=15",
    *[it for it in DRAWN if "hidden" not in it and "step_size" not in it],
    "network.hidden=8",
    "network.layers=1",
    "evaluation.solver.options.step_size=0.5",
    "callbacks.figures.num_samples=30",
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def run(tmp_path, kept, *overrides):
    return train(config(*SMALL, *overrides, f"data.cache={kept}", f"output_dir={tmp_path}/run"))


@alternated(task=["flow", "flow_matching"], data=["dw4", "lj13"])
def test_either_way_trains_and_is_evaluated(tmp_path, kept, data, task):
    results = run(tmp_path, kept, f"data={data}", f"task={task}")
    assert 1 / 40 <= results["test/effective_sample_fraction"] <= 1
    assert math.isfinite(results["test/nll"])
    assert math.isfinite(results["test/gap"])
    assert math.isfinite(results["test/log_normalizer"])
    assert results["test/log_normalizer_standard_error"] > 0
    assert ("test/free_energy_difference_reference" in results) == (data == "dw4")
    assert (tmp_path / "run" / "figures" / "final.png").is_file()
    density = divflow.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    x = density.sample(5)
    assert x.mean(dim=1).abs().max() < 1e-4
    assert density.log_prob(x).isfinite().all()


def test_commands_take_its_data(tmp_path, kept, monkeypatch):
    results = run(tmp_path, kept, "data=dw4", "task=flow_matching")
    monkeypatch.chdir(tmp_path)
    best = "ckpt_path=run/checkpoints/best.ckpt"
    named = [f"{'+' * ('data' in it)}{it}" for it in [*SAMPLES, *SAMPLER, f"data.cache={kept}"]]
    for i, more in enumerate([[], ["data=dw4", *(it.removeprefix("+") for it in named)]]):
        main(["evaluate", best, f"out={i}.npy", *more])
        assert np.load(f"{i}.npy")[:, 0].mean() == pytest.approx(-results["test/nll"], abs=1e-4)
    for out in ("samples.csv", "samples.png"):
        main(["sample", best, "num_samples=5", f"out={out}"])
        assert (tmp_path / out).is_file()


def test_the_command_of_the_guide_is_the_same_run():
    given = config("task=flow_matching", "data=dw4", "network=hollow_egnn", "network.mean_free=true", "base=mean_free")
    short = config("task=flow_matching", "data=dw4")
    assert given.network == short.network
    assert given.base == short.base
    assert config("task=flow_matching", "data=dw4", "network=pair_field").network._target_.endswith("PairField")


@pytest.mark.parametrize("task", ["flow", "flow_matching"])
def test_a_network_that_moves_the_centre_is_refused_at_once(tmp_path, kept, task):
    with pytest.raises(BaseError, match=r"moves it.*network\.mean_free=true"):
        run(tmp_path, kept, "data=dw4", f"task={task}", "network=hollow_egnn")
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("overrides", [["task=flow", "base=normal"], ["task=score", "base=normal"]])
def test_a_density_on_the_whole_space_is_refused(tmp_path, kept, overrides):
    with pytest.raises(ConfigError, match="base=mean_free"):
        run(tmp_path, kept, "data=dw4", *overrides)


class _Springs:
    """The energy of the normal density that a scaled base is: every weight is the same."""

    def __call__(self, x):
        return x.square().sum(dim=(1, 2)) / (2 * 1.5**2)


@torch.no_grad()
def test_weights_towards_the_flows_own_density(tmp_path):
    flow = ContinuousFlow(lambda t, x: 0 * x, (4, 2), base=MeanFreeNormal((4, 2)))
    density = FlowDensity(flow, MeanFreeScale(1.5))
    data = Particles(
        DoubleWell(), Tempering(rungs=8, power=2.0, std=2.0, chains=20, warm_up=20), 2, 2, 2, 4_000, cache=tmp_path
    )
    data.energy = _Springs()
    found = reweighted(density, data, Generator().manual_seed(0))
    assert abs(found["effective_sample_fraction"] - 1) < 1e-4
    assert abs(found["log_normalizer"] - 3 * math.log(2 * math.pi * 1.5**2)) < 1e-4
    assert "free_energy_difference" not in found
    data.energy = DoubleWell(c=1e-3, b=0.0, d0=2.0)
    found = reweighted(density, data, Generator().manual_seed(0))
    x = density.sample(200_000)
    weights = (-data.energy(x) - density.log_prob(x)).double().softmax(dim=0)
    expected = data.energy.free_energy_difference(weights @ data.energy.extended(x).double())
    error = found["free_energy_difference_standard_error"]
    assert 0 < error < 0.1
    assert abs(found["free_energy_difference"] - expected) < 5 * error
    estimated = density.with_flow(flow.replace(estimator=Hutchinson()))
    with pytest.raises(ImportanceError, match="Hutchinson"):
        reweighted(estimated, data)
    assert figures._log_weights(estimated, data, x[:5]) is None


def test_too_few_effective_samples_are_warned_of(tmp_path):
    """One weight outweighs all: the free energy's error is then next to nothing, whatever the truth."""
    flow = ContinuousFlow(lambda t, x: 0 * x, (4, 2), base=MeanFreeNormal((4, 2)))
    density = FlowDensity(flow, MeanFreeScale(1.5))
    data = Particles(
        DoubleWell(), Tempering(rungs=8, power=2.0, std=2.0, chains=20, warm_up=20), 2, 2, 2, 100, cache=tmp_path
    )
    with pytest.warns(ImportanceWarning, match=r"rest on \d+\.\d effective samples of 100.*num_weighted"):
        found = reweighted(density, data, Generator().manual_seed(0))
    assert 100 * found["effective_sample_fraction"] < 20
    data.energy = _Springs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reweighted(density, data, Generator().manual_seed(0))


def test_the_figure_shows_shares_of_all(tmp_path):
    """Histograms of data, samples and weighted samples: the same where weights make one of the other."""
    data = MeanFreeNormal((4, 2)).sample((5_000,))
    samples = 1.3 * data
    weights = -(1 - 1 / 1.3**2) * samples.square().sum(dim=(1, 2)) / 2
    figure = plot_energies(data, samples, weights, DoubleWell())
    assert isinstance(figure, Figure)
    for ax in figure.axes:
        (of_data, of_samples, weighted), edges = zip(*((it.get_data()[:2]) for it in ax.patches), strict=True)
        widths = edges[0][1:] - edges[0][:-1]
        assert 0.9 < (of_data * widths).sum() <= 1
        distance = [(abs(other - of_data) * widths).sum() for other in (of_samples, weighted)]
        assert distance[1] < 0.5 * distance[0]
    assert "effective sample size" in figure.axes[0].get_title()
    assert len(plot_energies(data, samples, None, DoubleWell()).axes[0].patches) == 2

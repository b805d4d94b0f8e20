"""FlowMatchingTask: in a user's own hands, and whole runs of the real configs."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from covering import thinned
from run import FAST, SMALL_TOY, config
from test_flow_task import as_it_is, trainer
from torch import nn
from torch.distributions import Independent, Normal
from torch.utils.data import DataLoader

import divflow
from divflow.divergence import FieldError
from divflow.flow import ContinuousFlow
from divflow.likelihood import Quadrature
from divflow.matching import ConditionalFlowMatching, OptimalTransportCoupling
from divflow.networks import MLP
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError
from divflow.tasks import FlowMatchingTask, FlowTask


def loader(rows, batch_size=100):
    return DataLoader(rows, batch_size=batch_size, collate_fn=as_it_is)


def fit(tmp_path, task, rows):
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    run.fit(task, loader(rows, 4), loader(rows))
    return run


class Recorder(nn.Module):
    """A velocity that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.net, self.given = MLP(2, hidden=(4,)), []

    def forward(self, t, x):
        self.given.append((t.detach().clone(), x.detach().clone()))
        return self.net(t, x)


@pytest.mark.parametrize("coupling", [pytest.param(None, marks=pytest.mark.slow), OptimalTransportCoupling()], ids=str)
def test_learns_the_density_of_the_data(tmp_path, coupling):
    torch.manual_seed(0)
    rows = 0.5 * torch.randn(4_000, 2) + torch.tensor([1.0, -1.0])
    objective = ConditionalFlowMatching() if coupling is None else ConditionalFlowMatching(coupling=coupling)
    flow = ContinuousFlow(MLP(2, hidden=(32,), activation=nn.SiLU, zero_init=True), 2, likelihood=Quadrature(7))
    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=320)
    task = FlowMatchingTask(flow, objective, 2, functools.partial(torch.optim.Adam, lr=0.02), schedule)
    run = trainer(tmp_path, max_epochs=20, limit_val_batches=0)
    run.fit(task, loader(rows, 250), loader(rows))
    results = run.test(task, loader(rows, 1_000), verbose=False)[0]
    entropy = Normal(0.0, 0.5).entropy().item() * 2
    assert abs(results["test/nll"] - entropy) < 3 * results["test/nll_standard_error"] + 0.02


def test_is_evaluated_as_maximum_likelihood_is(tmp_path):
    flow, rows = ContinuousFlow(MLP(2, hidden=(8,)), 2), loader(torch.randn(40, 2), 20)
    results = [trainer(tmp_path).test(task(flow), rows, verbose=False)[0] for task in (FlowMatchingTask, FlowTask)]
    assert results[0] == results[1]
    assert {"test/nll", "test/nll_standard_error", "test/nfe", "test/quadrature_error"} <= set(results[0])


def test_a_step_evaluates_the_velocity_once_at_a_time_for_each_draw(tmp_path):
    velocity = Recorder()
    task = FlowMatchingTask(ContinuousFlow(velocity, 2), draws=3)
    fit(tmp_path, task, torch.randn(8, 2))
    steps = [(t, x) for t, x in velocity.given if len(x) == 12]
    assert len(steps) == 2
    for t, _ in steps:
        assert t.unique().numel() == 12
        assert sorted((12 * t // 1).int().tolist()) == list(range(12))


def test_noise_is_that_of_the_flows_base(tmp_path):
    """Between a base far away and data at zero x_t lies at (1 - t) times the base."""
    base = Independent(Normal(torch.full((2,), 100.0), torch.full((2,), 0.1)), 1)
    velocity = Recorder()
    fit(tmp_path, FlowMatchingTask(ContinuousFlow(velocity, 2, base=base)), torch.zeros(4, 2))
    t, x = velocity.given[-1]
    torch.testing.assert_close(x / 100, (1 - t)[:, None].expand(4, 2), rtol=0.02, atol=0.02)


class ScalarTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, t, x):
        return self.net(torch.cat([x, t.reshape(1, 1).expand(len(x), 1)], dim=1))


def test_a_velocity_of_scalar_times_is_refused_before_the_first_step(tmp_path):
    velocity = ScalarTime()
    before = {name: tensor.clone() for name, tensor in velocity.state_dict().items()}
    with pytest.raises(FieldError, match="a time for each sample, but the velocity takes scalar times only"):
        fit(tmp_path, FlowMatchingTask(ContinuousFlow(velocity, 2)), torch.randn(8, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in velocity.state_dict().items())


def test_a_velocity_that_mixes_the_batch_is_refused(tmp_path):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, t, x):
            return self.norm(x)

    with pytest.raises(FieldError, match="norm is a BatchNorm1d"):
        fit(tmp_path, FlowMatchingTask(ContinuousFlow(Mixing(), 2)), torch.randn(8, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FlowMatchingTask(ContinuousFlow(MLP(2), 2, t_base=1.0, t_data=0.0)),
            "t_base=1 and t_data=0. Leave both",
        ),
        (lambda: FlowMatchingTask(ContinuousFlow(MLP(2), 2, t_data=2.0)), "t_base=0 and t_data=2"),
        (lambda: FlowMatchingTask(ContinuousFlow(MLP(2), 2), draws=0), "draws must be a whole number of at least 1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def run(tmp_path, *overrides, toy=True):
    return train(config(*FAST, *(SMALL_TOY if toy else []), f"output_dir={tmp_path}", "task=flow_matching", *overrides))


VARIANTS = {
    "independent": [],
    "optimal transport": ["coupling=optimal_transport", "coupling.max_rows=8"],
    "trigonometric": ["path=trigonometric", "times=logit_normal"],
    "vp": ["path=vp", "times=logit_normal", "times.mean=0.5"],
    "noise left": ["path.sigma_min=0.01", "times.stratified=false"],
    "bf16-mixed": ["device.precision=bf16-mixed"],
    "no average, no schedule": ["callbacks.average=null", "task.scheduler=null"],
    "a batch of one": ["coupling=optimal_transport", "data.batch_size=1", "task.draws=1"],
}


@thinned(variant=VARIANTS)
def test_variants_run(tmp_path, variant):
    results = run(tmp_path, *VARIANTS[variant])
    assert all(math.isfinite(value) for value in results.values())
    assert results["test/gap"] > 0
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["train/loss"].notna().sum() == 4
    for name in ("val/nll", "val/gap", "val/nfe", "val/quadrature_error"):
        assert table[name].notna().sum() == 2
    density = divflow.load(tmp_path / "checkpoints" / "best.ckpt")
    assert density.sample(3).shape == (3, 2)
    assert torch.isfinite(density.log_prob(torch.randn(3, 2))).all()


@pytest.mark.parametrize("event", [[64], [1, 8, 8]], ids=str)
def test_digits_report_bits_per_dimension(tmp_path, event):
    images = [] if event == [64] else [f"data.event_shape={event}", "network=conv", "network.hidden=[4]"]
    images += [] if event == [64] else ["estimator@evaluation.estimator=hutchinson"]
    results = run(tmp_path, "data=digits", *(setting.replace(" ", "") for setting in images), toy=False)
    bits = results["test/nll"] / (64 * math.log(2)) + math.log2(17)
    np.testing.assert_allclose(results["test/bits_per_dim"], bits, rtol=1e-5)
    assert 2 < bits < 4.5
    assert divflow.load(tmp_path / "checkpoints" / "last.ckpt").sample(2).shape == (2, *event)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    """Bit for bit: weights, averages, optimizer and metrics."""
    settings = ["coupling=optimal_transport", "data.num_train=48", "task.scheduler=null"]
    straight = run(tmp_path / "straight", *settings)
    run(tmp_path / "half", *settings, "trainer.max_steps=2")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    assert run(tmp_path / "half", *settings, f"ckpt_path={last}") == straight
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("straight", "half")
    ]
    for part in ("state_dict", "current_model_state"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    moments = [state["optimizer_states"][0]["state"] for state in states]
    assert all(torch.equal(moments[0][i][name], moments[1][i][name]) for i in moments[0] for name in moments[0][i])
    assert (tmp_path / "straight/metrics.csv").read_text() == (tmp_path / "half/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["t_base=1.0", "t_data=0.0"], "noise at t = 0.*t_base=1 and t_data=0"),
        (["t_data=2.0"], "t_data=2"),
        (["task.draws=0"], "draws must be a whole number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *overrides)

"""What tasks check before their first step: in training mode, and in evaluation mode."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from divflow.divergence import FieldError
from divflow.flow import ContinuousFlow
from divflow.score.objectives import ImplicitScoreMatching
from divflow.solver import Solver, SolverError
from divflow.tasks import FlowMatchingTask, FlowTask, ScoreTask, TaskError

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:The number of training batches"
)


class Force(nn.Module):
    """The gradient of a network, whose own graph is kept in training mode only."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, t, x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.net(z).sum(), z, create_graph=self.training)[0]


TASKS = {
    "likelihood": lambda detached: FlowTask(ContinuousFlow(Force(), 2, detached=detached)),
    "flow matching": lambda detached: FlowMatchingTask(ContinuousFlow(Force(), 2, detached=detached)),
    "score": lambda detached: ScoreTask(Force(), ImplicitScoreMatching()),
}


def _fit(task):
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, num_sanity_val_steps=0, **settings)
    trainer.fit(task, DataLoader(torch.randn(8, 2), batch_size=8))
    return trainer


@pytest.mark.parametrize("name", TASKS)
def test_what_evaluation_hides_is_refused_before_the_first_step(name):
    task = TASKS[name](False)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    with pytest.raises(FieldError, match="grad in line .* of test_checks"):
        _fit(task)
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert all(module.training for module in task.modules())


class Noisy(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), layer, nn.Linear(8, 2))

    def forward(self, t, x):
        return self.net(x)


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.3, self.training)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Dropout(0.3), r"net\.2 \(Dropout\)"),
        (nn.AlphaDropout(0.2), r"net\.2 \(AlphaDropout\)"),
        (Functional(), "a function within it"),
    ],
)
def test_a_random_velocity_is_no_ode_for_an_adaptive_solver(layer, named):
    with pytest.raises(
        FieldError, match=f"the velocity is random: .*follows the random numbers of {named}.*p=0 or eval"
    ):
        _fit(FlowTask(ContinuousFlow(Noisy(layer), 2)))
    few = {"max_evaluations": 60}
    if not isinstance(layer, Functional):
        with pytest.raises(SolverError, match=f"max_evaluations.*random numbers of {named}.*task=flow_matching"):
            ContinuousFlow(Noisy(layer), 2, solver=Solver(**few)).log_prob(torch.randn(8, 2))
    assert _fit(FlowMatchingTask(ContinuousFlow(Noisy(layer), 2))).global_step == 1
    fixed = Solver("rk4", options={"step_size": 0.5})
    assert _fit(FlowTask(ContinuousFlow(Noisy(layer), 2, solver=fixed))).global_step == 1
    assert _fit(FlowTask(ContinuousFlow(Noisy(nn.Dropout(0.0)), 2))).global_step == 1


@pytest.mark.parametrize("name", ["likelihood", "flow matching"])
def test_a_flow_that_means_it_trains(name):
    assert _fit(TASKS[name](True)).global_step == 1


@pytest.mark.parametrize(
    ("before", "now"),
    [("judge", "evaluate_batch"), ("judged", "evaluated_density"), ("check_judged", "check_evaluation")],
)
def test_a_method_under_its_earlier_name_is_refused(before, now):
    with pytest.raises(TaskError, match=f"Mine defines {before}, which is called {now} now. Rename it"):
        type("Mine", (FlowTask,), {before: lambda self, *arguments: None})
    assert type("Mine", (FlowTask,), {now: getattr(FlowTask, now)}).__name__ == "Mine"

"""`load_from_checkpoint` of tasks: from the command's checkpoints, and from those of a trainer of one's own."""

import functools

import pytest
import torch
from run import FAST, SMALL_TOY, config
from small_tasks import TASKS, flow, moons, network, quick, trainer

from divflow import load
from divflow.flow import ContinuousFlow
from divflow.networks import MLP
from divflow.runs.experiment import train
from divflow.saved.checkpoint import CheckpointError
from divflow.score.objectives import ImplicitScoreMatching
from divflow.tasks import FlowMatchingTask, FlowTask, ScoreTask, TaskError

RUNS = {
    "flow": (FlowTask, ["task.regularization.kinetic_energy=0.1", "task.optimizer.lr=0.003", "estimator=hutchinson"]),
    "flow_matching": (FlowMatchingTask, ["task.draws=3", "path=trigonometric"]),
    "score": (ScoreTask, ["times.weighting=sigma2", "network=mlp"]),
    "score without SDE": (ScoreTask, ["task=score", "sde=none", "objective=sliced", "network=mlp"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("run")
        task = [] if "SDE" in name else [f"task={name}"]
        results = train(config(*FAST, *SMALL_TOY, *task, *RUNS[name][1], "trainer.max_steps=2", f"output_dir={folder}"))
        return folder / "checkpoints" / "best.ckpt", results

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_command_is_brought_back(name, trained, tmp_path):
    path, results = trained(name)
    task = RUNS[name][0].load_from_checkpoint(path)
    settings = torch.load(path)["divflow_task"]
    optimizer = task.configure_optimizers()
    assert type(optimizer["optimizer"]) is torch.optim.AdamW
    assert optimizer["optimizer"].defaults["lr"] == settings["optimizer"]["lr"]
    assert optimizer["lr_scheduler"]["scheduler"].T_max == 2
    data = moons(num_train=64, num_val=20, num_test=30)
    found = trainer(tmp_path).test(task, datamodule=data, verbose=False)[0]
    assert found["test/loss" if "SDE" in name else "test/nll"] == pytest.approx(
        results["test/loss" if "SDE" in name else "test/nll"], rel=1e-5
    )
    trainer(tmp_path).fit(task, datamodule=data)  # in the ways of training


def test_its_settings_are_those_of_the_run(trained):
    path, _ = trained("flow")
    task = FlowTask.load_from_checkpoint(path)
    assert task._regularization == {"kinetic_energy": 0.1}
    assert str(task.density.flow.estimator).startswith("Hutchinson")
    assert str(task.evaluated_density.flow.estimator).startswith("Exact")
    other = FlowTask.load_from_checkpoint(path, optimizer=torch.optim.SGD, scheduler=None, regularization=None)
    assert type(other.configure_optimizers()["optimizer"]) is torch.optim.SGD
    assert not other._regularization
    saved = torch.load(path)
    for weights, place in {"averaged": "state_dict", "current": "current_model_state"}.items():
        state = FlowTask.load_from_checkpoint(path, weights=weights).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in saved[place].items())


class Mine(FlowTask):
    """A task of one's own."""


@pytest.mark.slow
def test_the_task_is_that_of_the_checkpoint(trained):
    path, _ = trained("flow")
    assert type(Mine.load_from_checkpoint(path)) is Mine
    with pytest.raises(TaskError, match="is of a FlowTask, not of a ScoreTask. Use FlowTask.load_from_checkpoint"):
        ScoreTask.load_from_checkpoint(path)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        TASKS["flow"]().load_from_checkpoint(path)


class Net(MLP):
    """A network of one's own."""


class Shrinking(torch.optim.SGD):
    """An optimizer of one's own."""


@pytest.mark.slow
def test_classes_of_ones_own_are_allowed_by_name(tmp_path):
    own = ["network._target_=test_loading.Net", "task.optimizer._target_=test_loading.Shrinking", "trainer.max_steps=2"]
    train(config(*FAST, *SMALL_TOY, *own, f"output_dir={tmp_path}"))
    path = tmp_path / "checkpoints" / "best.ckpt"
    with pytest.raises(CheckpointError, match="test_loading.Net"):
        FlowTask.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match="test_loading.Shrinking"):
        FlowTask.load_from_checkpoint(path, allow=[Net])
    task = FlowTask.load_from_checkpoint(path, allow=[Net, Shrinking])
    assert type(task.configure_optimizers()["optimizer"]) is Shrinking
    FlowTask.load_from_checkpoint(path, allow=[Net], optimizer=torch.optim.Adam)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Checkpoints of a trainer of one's own."""

    @functools.cache
    def path(name):
        folder = tmp_path_factory.mktemp("own")
        task, run = TASKS[name](), trainer(folder, max_steps=1)
        run.fit(task, datamodule=moons())
        run.save_checkpoint(folder / "own.ckpt")
        return folder / "own.ckpt", task

    return path


OWN = {
    "flow": (FlowTask, {"flow": flow}),
    "flow matching": (FlowMatchingTask, {"flow": flow}),
    "score": (ScoreTask, {"score": network, "objective": ImplicitScoreMatching}),
}


@pytest.mark.parametrize("name", quick("score", of=OWN))
def test_own_code_gives_what_it_built(name, own):
    (path, trained), (cls, make) = own(name), OWN[name]
    task = cls.load_from_checkpoint(path, **{key: it() for key, it in make.items()})
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(task.state_dict()[key], value, rtol=0, atol=0)
    given = ", ".join(f"{key}={key}" for key in make)
    with pytest.raises(TaskError, match=rf"{cls.__name__}.load_from_checkpoint\(path, {given}\)"):
        cls.load_from_checkpoint(path)


def test_own_code_that_does_not_fit(own, tmp_path):
    path, _ = own("flow")
    wider = ContinuousFlow(MLP(2, hidden=[9]), 2)
    with pytest.raises(CheckpointError, match=r"of another architecture.*\(8, .*9"):
        FlowTask.load_from_checkpoint(path, flow=wider)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        FlowTask.load_from_checkpoint(tmp_path / "no.ckpt", flow=flow())


class WithHyperparameters(FlowTask):
    """Whose arguments Lightning saves."""

    def __init__(self, hidden: int) -> None:
        super().__init__(ContinuousFlow(MLP(2, hidden=[hidden]), 2))
        self.save_hyperparameters()


@pytest.mark.slow
def test_hyperparameters_of_ones_own_are_lightnings(tmp_path):
    task, run = WithHyperparameters(5), trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, datamodule=moons())
    run.save_checkpoint(tmp_path / "own.ckpt")
    back = WithHyperparameters.load_from_checkpoint(tmp_path / "own.ckpt")
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in task.state_dict().items())


@pytest.mark.slow
def test_checkpoints_of_before_are_densities_of_tasks(tmp_path, trained):
    """A checkpoint that describes its density alone: the rest of the task is the class's default."""
    path, _ = trained("flow")
    before = torch.load(path)
    del before["divflow_task"]
    torch.save(before, tmp_path / "before.ckpt")
    task, density, x = FlowTask.load_from_checkpoint(tmp_path / "before.ckpt"), load(path), torch.randn(5, 2)
    torch.testing.assert_close(task.evaluated_density.log_prob(x), density.log_prob(x))
    assert type(task.configure_optimizers()["optimizer"]) is torch.optim.Adam

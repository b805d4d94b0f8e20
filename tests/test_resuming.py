"""What a run may go on from, and what it says of settings that the checkpoint overrules; both weights in the results."""

import json
import re
import shutil

import pytest
import torch
from run import FAST, SMALL_TOY, config

import divflow
from divflow.callbacks.plots import plot_curves
from divflow.errors import DivflowError
from divflow.runs.experiment import train
from divflow.saved.checkpoint import CheckpointError
from divflow.tasks.resuming import ResumeError


def run(folder, *overrides):
    return train(config(*FAST, *SMALL_TOY, f"output_dir={folder}", *overrides))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two steps, of flow matching, whose learning rate is not annealed."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = ["task=flow_matching", "task.scheduler=null", "trainer.max_steps=2"]
    return f"ckpt_path={folder}/checkpoints/last.ckpt", folder, run(folder, *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["task=flow", "network=mlp_64x3", "network.hidden=[16]"],
            r"not by divflow\.tasks\.maximum_likelihood\.FlowTask",
        ),
        (["task=flow_matching", "task.optimizer._target_=torch.optim.SGD"], r"by torch\.optim\.sgd\.SGD"),
        (["task=flow_matching", "callbacks.average=null"], "no callbacks.average"),
    ],
)
def test_another_training_is_refused_before_anything_is_lost(stopped, settings, message):
    last, folder, _ = stopped
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match=message):
        run(folder, last, "overwrite=true", *settings)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_objective_is_refused(tmp_path):
    settings = ["task=score", "sampler=annealed_langevin", "sde=none", "callbacks.best.monitor=val/loss"]
    run(tmp_path / "a", *settings, "objective=implicit")
    with pytest.raises(ResumeError, match=r"by the objective \S+ImplicitScoreMatching, not by \S+Sliced"):
        run(tmp_path / "b", *settings, "objective=sliced", f"ckpt_path={tmp_path}/a/checkpoints/last.ckpt")


def test_settings_that_the_checkpoint_overrules_are_reported(stopped, tmp_path, recwarn):
    last, _, _ = stopped
    run(tmp_path / "same", last, "task=flow_matching", "task.scheduler=null")
    assert not [it for it in recwarn if "goes on with" in str(it.message)]
    with pytest.warns(UserWarning, match=r"optimizer goes on with lr=0\.02 of the checkpoint, not with lr=0\.5\."):
        run(tmp_path / "rate", last, "task=flow_matching", "task.scheduler=null", "task.optimizer.lr=0.5")
    run(tmp_path / "annealed", "task=flow_matching")
    annealed = f"ckpt_path={tmp_path}/annealed/checkpoints/last.ckpt"
    with pytest.warns(
        UserWarning,
        match=r"schedule goes on with T_max=4 of the checkpoint, not with T_max=6\. Beyond T_max=4 the rate rises again to 0\.02\.",
    ):
        run(tmp_path / "longer", annealed, "task=flow_matching", "trainer.max_steps=6")
    with pytest.warns(UserWarning, match=r"not with T_max=3\. Start another run"):
        run(tmp_path / "same_steps", annealed, "task=flow_matching", "trainer.max_steps=6", "task.scheduler.T_max=3")


def test_results_have_the_seed_of_the_training_and_whose_steps_the_seconds_are(stopped, tmp_path, capsys):
    last, folder, _ = stopped
    first = json.loads((folder / "results.json").read_text())
    assert (first["seed"], first["steps"], first["resumed_at_step"]) == (0, 2, 0)
    with pytest.warns(UserWarning, match="not with seed=1"):
        run(tmp_path, last, "task=flow_matching", "task.scheduler=null", "trainer.max_steps=5", "seed=1")
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["seed"], found["steps"], found["resumed_at_step"]) == (0, 5, 2)
    assert re.search(r"training *│ *\d+ │ seconds, 3 of 5 steps", capsys.readouterr().out)


def test_another_seed_is_reported_and_changes_nothing(stopped, tmp_path, recwarn):
    """The order of rows and the noise go on with the seed of the checkpoint, so that both end in the same weights."""
    last, _, _ = stopped
    settings = [last, "task=flow_matching", "task.scheduler=null"]
    same = run(tmp_path / "same", *settings, "seed=0")
    assert not [it for it in recwarn if "seed=" in str(it.message)]
    with pytest.warns(UserWarning, match=r"noise go on with seed=0 of the checkpoint, not with seed=1, which only"):
        other = run(tmp_path / "other", *settings, "seed=1")
    assert other == same
    run(tmp_path / "none", *settings, "seed=null")
    assert not [it for it in recwarn if "seed=" in str(it.message)]


def test_results_have_both_weights(stopped, tmp_path, capsys):
    """Each as a run that ends with them finds it: at a learning rate of zero both are what training starts from."""
    _, folder, results = stopped
    averaged, current = results["val/nll"], results["val/nll_current_weights"]
    assert averaged != current
    for weights, value in (("averaged", averaged), ("current", current)):
        start = [f"init_from={folder}/checkpoints/best.ckpt", f"weights={weights}", "task.optimizer.lr=0"]
        found = run(tmp_path / weights, "task=flow_matching", *start)
        assert found["val/nll"] == found["val/nll_current_weights"] == value
    printed = capsys.readouterr().out
    assert re.search(rf"validation, averaged weights\W+{averaged:.4f}\W+nats", printed)
    assert re.search(rf"validation, current weights\W+{current:.4f}\W+nats", printed)
    assert (
        json.loads((tmp_path / "current" / "results.json").read_text())["metrics"]["val/nll_current_weights"] == current
    )
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert (
        sum(
            "val/nll" in rows[0].split(",") and row.split(",")[rows[0].split(",").index("val/nll")] != ""
            for row in rows[1:]
        )
        == 1
    )
    plain = run(tmp_path / "plain", "task=flow_matching", "callbacks.average=null")
    assert "val/nll_current_weights" not in plain


ODD = {
    "a plain state": (
        lambda checkpoint: checkpoint["state_dict"],
        r"only the state of a module \(\d+ tensors, such as 'density",
    ),
    "a list": (lambda checkpoint: [1, 2], "holds a list"),
    "a tensor": (lambda checkpoint: torch.zeros(3), "holds a Tensor"),
    "no step": (lambda checkpoint: checkpoint.pop("global_step") and checkpoint, "its global_step is 'missing'"),
    "a step in words": (lambda checkpoint: checkpoint | {"global_step": "many"}, "its global_step is 'many'"),
    "no state": (lambda checkpoint: checkpoint | {"state_dict": [1]}, "its state_dict is a list, not tensors"),
    "numbers": (lambda checkpoint: checkpoint | {"state_dict": {"a": 3}}, "its state_dict is a dict, not tensors"),
    "no settings": (lambda checkpoint: checkpoint | {"divflow": "a"}, "its divflow is a, not settings"),
    "weights alone": (
        lambda checkpoint: checkpoint.pop("optimizer_states") and checkpoint,
        "not what training resumes from .optimizer",
    ),
    "another optimizer's groups": (
        lambda checkpoint: checkpoint | {"optimizer_states": [{"param_groups": [{"params": [0]}], "state": {}}]},
        r"groups of \[1\] parameters, but this one has groups of \[\d+\]",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_checkpoints_are_typed(stopped, tmp_path, kind):
    _, folder, _ = stopped
    change, message = ODD[kind]
    torch.save(change(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)), tmp_path / "odd.ckpt")
    settings = ["task=flow_matching", "task.scheduler=null", f"ckpt_path={tmp_path}/odd.ckpt"]
    with pytest.raises(DivflowError, match=message):
        run(tmp_path / "run", *settings)
    if "training" not in message and "groups" not in message:
        with pytest.raises(DivflowError, match=message):
            divflow.load(tmp_path / "odd.ckpt")


def test_an_incomplete_description_is_typed(stopped, tmp_path):
    _, folder, _ = stopped
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for change, message in (
        (lambda it: it.pop("network"), "KeyError: 'network'"),
        (lambda it: it.update(network=None), "TypeError"),
    ):
        described = dict(checkpoint["divflow"])
        change(described)
        torch.save(checkpoint | {"divflow": described}, tmp_path / "odd.ckpt")
        with pytest.raises(CheckpointError, match=f"an incomplete description of a density: {message}"):
            divflow.load(tmp_path / "odd.ckpt")


def test_rows_of_metrics_that_were_cut_off_are_left_out(stopped, tmp_path):
    """Of a resumed run and of its curve; the others are kept."""
    _, folder, _ = stopped
    shutil.copytree(folder, tmp_path / "run")
    table = tmp_path / "run" / "metrics.csv"
    lines = table.read_text().splitlines()
    step = lines[0].split(",").index("step")
    empty = [cell if i != step else "" for i, cell in enumerate(lines[1].split(","))]
    table.write_text("\n".join([*lines[:2], ",".join(empty), lines[1][: len(lines[1]) // 2], *lines[2:]]) + "\n")
    assert plot_curves({"": table}) is not None
    last = f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    run(tmp_path / "run", "task=flow_matching", "task.scheduler=null", last, "overwrite=true")
    steps = [row.split(",")[step] for row in table.read_text().splitlines()[1:]]
    assert "" not in steps
    assert steps.count("0") == lines[1].split(",")[step].count("0")

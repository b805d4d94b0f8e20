"""Runs that start from the weights of another run."""

import pytest
import torch
from run import FAST, SMALL_TOY, config

from divflow.runs.experiment import train
from divflow.runs.settings import check_settings
from divflow.saved.build import ConfigError
from divflow.saved.checkpoint import CheckpointError


def run(tmp_path, *overrides):
    # The step of the config, since weights are compared by the last bit of the likelihood.
    fast = [override for override in FAST if "step_size" not in override]
    return train(config(*fast, *SMALL_TOY, f"output_dir={tmp_path}", *overrides))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A flow by flow matching: its checkpoint, of averaged weights that are not the current ones, and its results."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    results = run(folder, "task=flow_matching", "callbacks.average.decay=0.5", "callbacks.best.monitor=step")
    return folder / "checkpoints" / "best.ckpt", results


@pytest.mark.parametrize("task", ["flow", "flow_matching"])
def test_starts_from_the_averaged_weights(pretrained, tmp_path, task, capsys):
    """At a learning rate of zero it ends where the other ended, by the likelihood that evaluated that one."""
    checkpoint, results = pretrained
    settings = [f"task={task}", "network=mlp_deep", f"init_from={checkpoint}", "task.optimizer.lr=0"]
    assert run(tmp_path, *settings)["test/nll"] == results["test/nll"]
    source = torch.load(checkpoint, weights_only=True)
    assert any(not torch.equal(v, source["state_dict"][k]) for k, v in source["current_model_state"].items())
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in source["state_dict"].items():
        assert torch.equal(value, last["current_model_state"][name])
    printed = capsys.readouterr().out
    numbers = sum(value.numel() for value in source["state_dict"].values())
    tensors = len(source["state_dict"])
    assert "starting from best.ckpt, averaged weights of step 2" in printed
    assert f"({numbers} numbers in {tensors} tensors);" in printed


def test_a_standardization_of_other_data_is_reported(tmp_path, capsys):
    weights = f"init_from={tmp_path}/0/checkpoints/best.ckpt"
    for i, (factor, more) in enumerate([(1, []), (1, [weights]), (100, [weights])]):
        rows = "".join(f"{j + 0.5},{factor * (j * j + 0.5)}\n" for j in range(40))
        (tmp_path / f"{i}.csv").write_text(f"a,b\n{rows}")
        train(config(*FAST, "data=table", f"data.path={tmp_path}/{i}.csv", f"output_dir={tmp_path}/{i}", *more))
        said = "tensors), the standardization of its data included, which is not that of these data;"
        assert (said in capsys.readouterr().out) == (factor == 100)


def test_the_optimizer_starts_anew(pretrained, tmp_path):
    checkpoint, _ = pretrained
    run(tmp_path, "network=mlp_deep", f"init_from={checkpoint}", "trainer.max_steps=2", "task.optimizer.lr=1e-3")
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert {state["step"].item() for state in last["optimizer_states"][0]["state"].values()} == {2}


def test_without_an_average_the_weights_are_those_there_are(tmp_path, capsys):
    run(tmp_path / "a", "callbacks.average=null")
    run(tmp_path / "b", f"init_from={tmp_path}/a/checkpoints/last.ckpt")
    assert "starting from last.ckpt, weights of step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network=mlp_deep", "network.hidden=[8]"], r"0\.weight has shape \(16, 3\) there and \(8, 3\) here"),
        (["network=mlp_deep", "network.hidden=[16,16]"], r"velocity\.layers\.4\.bias is missing"),
        (["network=mlp_deep", "network.hidden=[]"], r"velocity\.layers\.2\.bias is unknown"),
        (["task=score"], r"velocity\.score\.network\.layers\.\d\.\w+ is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(pretrained, tmp_path, overrides, message):
    checkpoint, _ = pretrained
    with pytest.raises(CheckpointError, match=rf"best\.ckpt is of another architecture.*{message}"):
        run(tmp_path, *overrides, f"init_from={checkpoint}")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere\.ckpt"):
        run(tmp_path, "init_from=nowhere.ckpt")
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    with pytest.raises(
        CheckpointError, match=r"other\.ckpt is not the checkpoint of a run: its global_step is 'missing'"
    ):
        run(tmp_path, f"init_from={tmp_path}/other.ckpt")


def test_a_run_goes_on_from_its_own_weights_by_the_command_that_started_it(pretrained, tmp_path):
    checkpoint, _ = pretrained
    start = ["network=mlp_deep", f"init_from={checkpoint}", "task.optimizer.lr=1e-3"]
    run(tmp_path / "whole", *start)
    run(tmp_path / "first", *start, "trainer.max_steps=2", "task.scheduler.T_max=4")
    run(tmp_path / "second", *start, f"ckpt_path={tmp_path}/first/checkpoints/last.ckpt")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "second")
    )
    assert whole["global_step"] == parts["global_step"] == 4
    for name, value in whole["current_model_state"].items():
        assert torch.equal(value, parts["current_model_state"][name])


def test_a_file_that_is_not_there_is_reported_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.ckpt .*init_from"):
        check_settings(config("init_from=nowhere.ckpt", f"output_dir={tmp_path}"))

"""The folder of a run: what can be started again from it, and that nothing of another run is lost."""

import json
import os
import re

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from run import DRAWN, FAST, SMALL_TOY, config, run_here

from divflow.runs.experiment import train
from divflow.runs.folder import claim, link_latest, save_config
from divflow.runs.settings import check_settings
from divflow.saved.build import ConfigError

SMALL = [*DRAWN, *SMALL_TOY, "callbacks.figures.num_samples=50"]


def taken(folder, ckpt_path, step=0, overwrite=False):
    with claim(folder, ckpt_path, step, overwrite):
        pass


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_started_again_from_its_config_elsewhere_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{150.5 + i % 13},{50.5 + i % 7}" for i in range(60))
    (tmp_path / "people.csv").write_text("height,weight\n" + rows)
    first, other = tmp_path / "first", tmp_path / "other"
    results = train(config(*FAST, "data=table", "data.path=people.csv", "estimator=hutchinson", f"output_dir={first}"))
    before = contents(first)
    other.mkdir()
    monkeypatch.chdir(other)
    run_here(f"--config-path={first}", "--config-name=config")
    assert contents(first) == before
    again = (other / "outputs" / "latest").resolve()
    assert json.loads((again / "results.json").read_text())["metrics"] == pytest.approx(results, rel=0, abs=0)
    assert {path.name for path in other.iterdir()} == {"outputs"}


def test_a_config_names_no_folder_of_the_run_and_files_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed = config("data=table", "data.path=here.csv", "ckpt_path=x/last.ckpt", f"output_dir={tmp_path}/run")
    save_config(composed, tmp_path, "step 3 of x/last.ckpt")
    text = (tmp_path / "config.yaml").read_text()
    assert "went on from step 3 of x/last.ckpt" in text
    saved = OmegaConf.create(text)
    assert saved.data.path == f"{tmp_path}/here.csv"
    assert saved.ckpt_path is None
    saved.output_dir = "elsewhere"
    assert saved.callbacks.last.dirpath == "elsewhere/checkpoints"
    assert str(tmp_path / "run") not in "".join(line for line in text.splitlines() if not line.startswith("#"))


def test_results_of_another_run_are_kept_unless_asked(tmp_path):
    train(config(*SMALL, f"output_dir={tmp_path}", "seed=1"))
    before = contents(tmp_path)
    with pytest.raises(
        ConfigError, match=r"results of another run \(checkpoints/best.ckpt and 5 more\).*overwrite=true"
    ):
        train(config(*SMALL, f"output_dir={tmp_path}"))
    assert contents(tmp_path) == before
    stale = tmp_path / "figures" / "step_000100.png"
    stale.touch()
    train(config(*SMALL, f"output_dir={tmp_path}", "overwrite=true"))
    assert not stale.exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_run_goes_on_in_its_own_folder_only(tmp_path):
    for name in ("own", "other"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    last = str(tmp_path / "own" / "checkpoints" / "last.ckpt")
    taken(tmp_path / "own", last, 3)
    with pytest.raises(ConfigError, match=r"go on with that run by ckpt_path=.*other/checkpoints/last.ckpt"):
        taken(tmp_path / "other", last, 3)
    (tmp_path / "killed").mkdir()  # before its first checkpoint: there is nothing to lose
    (tmp_path / "killed" / "metrics.csv").touch()
    taken(tmp_path / "killed", None)
    # A finished run has later results than its best checkpoint.
    (tmp_path / "own" / "results.json").write_text('{"steps": 5}')
    with pytest.raises(ConfigError, match=r"results of this run at step 5, later than step 3 of .*overwrite=true"):
        taken(tmp_path / "own", last, 3)
    taken(tmp_path / "own", last, 5)
    taken(tmp_path / "own", last, 3, overwrite=True)


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with (
        claim(tmp_path / "run", None, 0, overwrite=False),
        pytest.raises(ConfigError, match="another run is writing to .*run now"),
        claim(tmp_path / "run", None, 0, overwrite=True),
    ):
        pass
    taken(tmp_path / "run", None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run can't be made: Not a directory"):
        taken(tmp_path / "file" / "run", None)


def test_the_latest_run_is_gone_on_with_by_its_link(tmp_path, monkeypatch):
    """And what a run started from is the same when it is started again, wherever that link leads by then."""
    monkeypatch.chdir(tmp_path)
    last = "outputs/latest/checkpoints/last.ckpt"
    run_here(*FAST, *SMALL_TOY)
    first = (tmp_path / "outputs" / "latest").resolve()
    run_here(*FAST, *SMALL_TOY, f"ckpt_path={last}", "trainer.max_steps=6", "task.scheduler.T_max=4")
    second = (tmp_path / "outputs" / "latest").resolve()
    assert second != first
    assert torch.load(last, weights_only=True)["global_step"] == 6
    run_here(*FAST, *SMALL_TOY, f"init_from={last}")
    saved = OmegaConf.load("outputs/latest/config.yaml")
    assert saved.init_from == str(second / "checkpoints" / "last.ckpt")
    run_here(
        *FAST,
        *SMALL_TOY,
        f"ckpt_path={last}",
        "output_dir=outputs/latest",
        "trainer.max_steps=6",
        "task.scheduler.T_max=4",
    )
    assert json.loads((tmp_path / "outputs" / "latest" / "results.json").read_text())["steps"] == 6
    with pytest.raises(SystemExit, match=r"no file outputs/latest/x.ckpt"):
        run_here(*FAST, *SMALL_TOY, "ckpt_path=outputs/latest/x.ckpt")
    assert (tmp_path / "outputs" / "latest" / "results.json").is_file()  # what did not begin is not the latest


def test_the_latest_run_has_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        run_folder = tmp_path / "outputs" / "flow_two_moons" / name
        run_folder.mkdir(parents=True)
        link_latest(run_folder)
        assert (tmp_path / "outputs" / "latest").resolve() == run_folder
    link_latest(tmp_path / "c")
    assert (tmp_path / "outputs" / "latest").resolve().name == "b"
    assert len(list((tmp_path / "outputs").iterdir())) == 2


def test_one_folder_whatever_its_name_is_given_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here(*SMALL, "output_dir=mine")
    assert os.listdir(tmp_path) == ["mine"]
    assert set(os.listdir("mine")) == {
        "config.yaml", "metrics.csv", "results.json", "checkpoints", "figures", "samples.npy",
    }  # fmt: skip
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert results["overrides"] == [*SMALL, "output_dir=mine"]
    assert results["steps"] == 4


def test_sweeps_name_their_folders_by_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here("-m", *FAST, *SMALL_TOY, "seed=1,2", "trainer.max_steps=2")
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    names = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert names == ["seed-1", "seed-2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=table", r"data\.path must be given"),
        ("ckpt_path=none.ckpt", "there is no file none.ckpt .*ckpt_path"),
        ("evaluation.solver.method=dopri9", "unknown solver method 'dopri9'"),
        ("seed=-1", "seed must be null or a whole number"),
        ("trainer.max_steps=-5", "max_steps must be a whole number, or -1 for no limit, but is -5"),
        ("trainer.max_steps=many", "max_steps must be a whole number, or -1 for no limit, but is 'many'"),
        ("trainer.val_check_interval=-2", "val_check_interval must be a number of steps .*, but is -2"),
        ("+network.depth=3", "network.depth is no setting of MLP"),
        ("+task.optimizer.momentum=0.9", "task.optimizer.momentum is no setting of AdamW"),
        ("+task.scheduler.foo=1", "task.scheduler.foo is no setting of CosineAnnealingLR"),
    ],
)
def test_what_is_wrong_is_reported_before_lightning_is_there(override, message):
    with pytest.raises((ConfigError, InstantiationException)) as caught:
        check_settings(config(override, "output_dir=x"))
    assert re.search(message, f"{caught.value} {caught.value.__cause__}")


def test_gpus_that_are_not_there_are_reported_before_lightning_is_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for settings in (["device=gpu"], ["device=multi_gpu"], ["device=gpu", "device.devices=[0,1]"]):
        check_settings(config(*settings, "output_dir=x"))
    for devices in ("3", "[0,2]"):
        with pytest.raises(ConfigError, match=r"asks for GPUs of this machine, but torch sees 2.*device.devices=2"):
            check_settings(config("device=gpu", f"device.devices={devices}", "output_dir=x"))


def test_a_folder_that_can_not_be_written_is_reported_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("divflow.runs.experiment.train", None)  # is not come to
    for folder, message in (
        ("/proc", r"^error: output_dir=/proc can't be written \(.+\)\. Choose another folder by output_dir="),
        ("/proc/run", r"^error: /proc/run can't be made \(.+\)\. Choose another folder by output_dir="),
        ("file/run", r"file/run can't be made \(Not a directory\)\. Choose"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_here(*SMALL, f"output_dir={folder}")


def test_results_of_another_run_are_protected_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (last := tmp_path / "checkpoints" / "last.ckpt").write_text("precious")
    monkeypatch.setattr("divflow.runs.experiment.train", lambda config: {"val/nll": 1.0})
    with pytest.raises(SystemExit, match=r"holds the results of another run \(checkpoints/last.ckpt\)"):
        run_here(*SMALL, f"output_dir={tmp_path}")
    for going_on in ("overwrite=true", f"ckpt_path={last}"):
        run_here(*SMALL, f"output_dir={tmp_path}", going_on)
    assert last.read_text() == "precious"

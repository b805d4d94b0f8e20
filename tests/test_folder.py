"""The folder of a run: what can be started again from it, and that nothing of another run is lost."""

import json
import os
import re

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from run import FAST, SMALL_TOY, config, run

from divflow.build import ConfigError, check_settings
from divflow.experiment import train
from divflow.folder import claim, link_latest, save_config

SMALL = [*FAST, *SMALL_TOY]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_started_again_from_its_config_elsewhere_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{150 + i % 13},{50 + i % 7}" for i in range(60))
    (tmp_path / "people.csv").write_text("height,weight\n" + rows)
    first, other = tmp_path / "first", tmp_path / "other"
    results = train(config(*FAST, "data=table", "data.path=people.csv", "estimator=hutchinson", f"output_dir={first}"))
    before = contents(first)
    other.mkdir()
    monkeypatch.chdir(other)
    done = run(f"--config-path={first}", "--config-name=config")
    assert done.returncode == 0, done.stderr
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


def test_results_of_another_run_are_kept_unless_told(tmp_path):
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
    claim(tmp_path / "own", last, overwrite=False)
    with pytest.raises(ConfigError, match=r"go on with that run by ckpt_path=.*other/checkpoints/last.ckpt"):
        claim(tmp_path / "other", last, overwrite=False)
    (tmp_path / "killed").mkdir()  # before its first checkpoint: there is nothing to lose
    (tmp_path / "killed" / "metrics.csv").touch()
    claim(tmp_path / "killed", None, overwrite=False)


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
    done = run(*SMALL, "output_dir=mine")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["mine"]
    assert set(os.listdir("mine")) == {
        "config.yaml", "metrics.csv", "results.json", "checkpoints", "figures", "samples.npy",
    }  # fmt: skip
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert results["overrides"] == [*SMALL, "output_dir=mine"]
    assert results["steps"] == 4


def test_sweeps_name_their_folders_by_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("-m", *SMALL, "seed=1,2", "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    names = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert names == ["seed=1", "seed=2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=table", r"data\.path must be given"),
        ("ckpt_path=none.ckpt", "there is no file none.ckpt .*ckpt_path"),
        ("evaluation.solver.method=dopri9", "unknown solver method 'dopri9'"),
    ],
)
def test_what_is_wrong_is_told_before_lightning_is_there(override, message):
    with pytest.raises((ConfigError, InstantiationException)) as caught:
        check_settings(config(override, "output_dir=x"))
    assert re.search(message, f"{caught.value} {caught.value.__cause__}")

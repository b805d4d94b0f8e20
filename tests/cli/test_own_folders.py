"""What a user keeps in folders of their own: data whose paths are relative, and configs beside those of divflow."""

import os

import numpy as np
import pytest
import torch
from run import FAST, SMALL_TOY, run_here

from divflow.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_relative_paths_are_those_of_the_folder_where_the_command_was_typed(folder):
    np.save("points.npy", torch.randn(60, 2).numpy())
    changing = [*FAST, "hydra.job.chdir=true", "data=table", "data.path=points.npy"]
    run_here(*changing)
    first = (folder / "outputs" / "latest").resolve()
    assert first.parent == folder / "outputs" / "flow_table"
    assert sorted(os.listdir(first)) == ["checkpoints", "config.yaml", "metrics.csv", "results.json"]
    assert sorted(os.listdir(folder)) == ["outputs", "points.npy"]
    main(["evaluate", "hydra.job.chdir=true", "ckpt_path=outputs/latest/checkpoints/best.ckpt"])
    assert (folder / "log_prob.csv").is_file()


def test_an_sde_of_ones_own_config_needs_no_more_than_the_sde(folder):
    (folder / "own" / "sde").mkdir(parents=True)
    sde = "sde:\n  _target_: divflow.score.VariancePreserving\n  beta_max: 10.0\n"
    (folder / "own" / "sde" / "mine.yaml").write_text(f"# @package _global_\n{sde}")
    settings = [*FAST, *SMALL_TOY, "task=score", "objective=denoising", "sde=mine", "output_dir=run"]
    run_here(*settings, f"hydra.searchpath=[file://{folder}/own]")
    assert "beta_max: 10.0" in (folder / "run" / "config.yaml").read_text()

"""Checkpoints that runs wrote before modules had rooms: they load, are evaluated and go on as they did then.

Made by `python train.py` of version 0.1.0, four steps each with the settings below; the numbers are those that the code of then gave for them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from run import config

import divflow
from divflow.cli import main
from divflow.distributions import MeanFreeNormal
from divflow.flow.transforms import Affine, Bounded, Compose, MeanFreeScale
from divflow.runs.experiment import train

FOLDER = Path(__file__).parent / "checkpoints"
RUN = [
    "device=cpu",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "+trainer.enable_progress_bar=false",
    "callbacks.progress=null",
    "callbacks.figures=null",
    "solver@evaluation.solver=rk4",
    "likelihood@evaluation.likelihood=quadrature_7",
    "network.hidden=[8]",
]
FEW = ["data.num_train=64", "data.num_val=20", "data.num_test=30"]
DATA = {
    "flow": [
        "data=table",
        f"data.path={FOLDER / 'measurements.csv'}",
        "data.bounds={length: [0, null], share: [0, 1]}",
        "data.batch_size=16",
    ],
    "score": ["data=two_moons", *FEW, "data.batch_size=16"],
    "flow_matching": [
        "data=dw4",
        *FEW,
        "data.num_weighted=20",
        "data.sampler.chains=20",
        "data.sampler.warm_up=20",
        "data.batch_size=16",
    ],
}
TASK = {
    "flow": [],
    "score": ["task=score"],
    "flow_matching": ["task=flow_matching", "network=pair_field", "callbacks.average.decay=0.5"],
}
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", DATA)
def test_densities_are_those_of_then(name):
    density, expected = divflow.load(FOLDER / f"{name}.ckpt"), EXPECTED[name]
    density.watch_units = False  # of points that lie anywhere
    found = density.log_prob(torch.tensor(expected["x"], dtype=torch.float64))
    np.testing.assert_allclose(found.detach().numpy(), expected["log_prob"], rtol=1e-5)


def test_what_they_name_is_built_of_the_classes_of_now():
    flow, score, particles = (divflow.load(FOLDER / f"{name}.ckpt") for name in DATA)
    assert type(flow.transform) is Compose
    assert [type(part) for part in flow.transform.parts] == [Bounded, Affine]
    assert flow.columns == ["length", "slope", "share"]
    assert type(score.transform) is Affine
    assert type(particles.transform) is MeanFreeScale
    assert type(particles.flow.base.distribution) is MeanFreeNormal


@pytest.mark.parametrize("name", DATA)
def test_commands_take_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = [f"data.cache={tmp_path}"] if name == "flow_matching" else []
    main(["evaluate", "device=cpu", f"ckpt_path={FOLDER / f'{name}.ckpt'}", *DATA[name], *cache, "out=log_prob.npy"])
    np.testing.assert_allclose(-np.load("log_prob.npy")[:, 0].mean(), EXPECTED[name]["evaluated"], rtol=1e-5)
    main(["sample", "device=cpu", f"ckpt_path={FOLDER / f'{name}.ckpt'}", "num_samples=5", "seed=0", "out=samples.npy"])
    np.testing.assert_allclose(np.load("samples.npy").std(), EXPECTED[name]["sampled"], rtol=1e-4)


@pytest.mark.parametrize("name", DATA)
def test_runs_go_on_from_them(name, tmp_path):
    last = tmp_path / "before" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    shutil.copy(FOLDER / f"{name}.ckpt", last)
    cache = [f"data.cache={tmp_path}"] if name == "flow_matching" else []
    settings = [
        *TASK[name],
        *DATA[name],
        *cache,
        *RUN,
        "trainer.max_steps=6",
        "task.scheduler.T_max=4",
        "callbacks.average.warm_up=false",
    ]
    results = train(config(*settings, f"ckpt_path={last}", f"output_dir={tmp_path / 'on'}"))
    np.testing.assert_allclose(results["test/nll"], EXPECTED[name]["resumed"], rtol=1e-4)

"""What `divflow train` gives to a sweeper, what `divflow compare` shows, and whose weights are tested."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from run import FAST, SMALL_TOY, config

import divflow
from divflow.cli import main
from divflow.experiment import train

SMALL = [*FAST, *SMALL_TOY, "callbacks.figures=null"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in seed and estimator."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, estimator in enumerate(("exact", "hutchinson")):
        train(config(*SMALL, f"seed={seed}", f"estimator={estimator}", f"output_dir={folder}/{estimator}"))
    return folder


def test_a_sweeper_is_given_the_best_value_of_what_is_monitored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "returned_value.py").write_text(
        "from pathlib import Path\n"
        "from hydra.experimental.callback import Callback\n"
        "class Note(Callback):\n"
        "    def on_job_end(self, config, job_return, **kwargs):\n"
        "        Path('returned.txt').write_text(str(job_return.return_value))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    main(["train", *SMALL, "output_dir=run", "+hydra.callbacks.note._target_=returned_value.Note"])
    validated = pd.read_csv("run/metrics.csv")["val/nll"].dropna()
    returned = float((tmp_path / "returned.txt").read_text())
    np.testing.assert_allclose(returned, validated.min(), rtol=1e-6)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["val/nll"] == returned


def test_runs_are_named_by_what_differs(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    main(["compare", str(runs)])
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {cells[0]: cells[1:] for cells in lines if len(cells) == 3}
    assert table["seed"] == ["0", "1"]
    assert table["estimator"] == ["Exact", "Hutchinson"]
    assert table["estimator.num_probes"] == ["–", "1"]
    assert "solver.method" not in table
    for column, name in enumerate(("exact", "hutchinson")):
        results = json.loads((runs / name / "results.json").read_text())["metrics"]
        expected = f"{results['test/nll']:.4f} ± {results['test/nll_standard_error']:.4f}"
        assert table["test/nll"][column] == expected
    with open("compare.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}"], "there.png exists.*--out.*--overwrite"),
        (["nowhere"], "there is no finished run"),
        (["broken"], "broken/results.json is not that of a run"),
    ],
)
def test_what_can_not_be_compared(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    out = "there.png" if "runs" in arguments[0] else "new.png"
    (tmp_path / "there.png").write_text("precious")
    with pytest.raises(SystemExit, match=message):
        main(["compare", *(argument.format(runs=runs) for argument in arguments), "--out", out])
    assert (tmp_path / "there.png").read_text() == "precious"
    assert ("test/nll" in capsys.readouterr().out) == ("runs" in arguments[0])  # the table is shown before its figure


def test_a_checkpoint_gets_one_number_whoever_loads_it(tmp_path):
    """Averaged weights, also where a run that goes on has no step left to train."""
    cfg = config(*SMALL, "callbacks.average.decay=0.9", "network.zero_init=false", f"output_dir={tmp_path}/run")
    train(cfg)
    moved = tmp_path / "moved.ckpt"
    shutil.copy(tmp_path / "run" / "checkpoints" / "best.ckpt", moved)
    again = train(
        config(*SMALL, "trainer.max_steps=0", "callbacks.average.decay=0.9", "network.zero_init=false",
               f"ckpt_path={moved}", f"output_dir={tmp_path}/again")
    )  # fmt: skip
    rows = instantiate(cfg.data, _convert_="all").test.rows
    loaded = -divflow.load(moved).log_prob(rows).mean().item()
    np.testing.assert_allclose(again["test/nll"], loaded, rtol=1e-6)
    state = torch.load(moved, weights_only=True)
    differ = [not torch.equal(state["state_dict"][name], value) for name, value in state["current_model_state"].items()]
    assert any(differ)  # else it would say nothing

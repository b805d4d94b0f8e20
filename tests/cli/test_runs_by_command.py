"""What `divflow train` gives to a sweeper, what `divflow compare` shows, and whose weights are tested."""

import errno
import json
import os
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from run import FAST, SMALL_TOY, config

import divflow
from divflow.cli import main
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError

SMALL = [*FAST, *SMALL_TOY]
DATA = ["data=two_moons", *SMALL_TOY]


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
    for _ in range(2):  # a second time it has nothing in its way
        capsys.readouterr()
        main(["compare", str(runs)])
    assert os.listdir() == []
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
        assert table["test/quadrature_error"][column] == f"{results['test/quadrature_error']:.1e}"
    main(["compare", str(runs), "--out", "curves.png"])
    with open("curves.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    main(["compare", str(runs), "--out", "table.csv"])
    written = pd.read_csv("table.csv", index_col=0)
    assert list(written.loc["test/nll"]) == table["test/nll"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}"], "there.png exists. Choose another file by --out FILE, or let it be replaced by --overwrite$"),
        (["nowhere"], "there is no finished run"),
        (["broken"], "broken/results.json was not written by a run"),
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
    assert "test/nll" not in capsys.readouterr().out  # the file is looked at first


def finished(folder, nll, seed, lr, more="", results=None):
    folder.mkdir(parents=True)
    metrics = {"test/nll": nll, "test/nll_standard_error": 0.5}
    (folder / "results.json").write_text(json.dumps({"metrics": metrics, "seconds": 1.0, "steps": 3} | (results or {})))
    (folder / "config.yaml").write_text(f"seed: {seed}\ntask:\n  lr: {lr}\n{more}")


def compared(capsys, *arguments):
    """The lines of `divflow compare`, each as its cells, and what it reports beside them."""
    main(["compare", *arguments])
    printed = capsys.readouterr()
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in printed.out.splitlines()], printed


def test_seeds_are_one_line_and_the_best_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for lr, values in ((0.1, [3.0, 4.0, 5.0]), (0.01, [1.0, 2.0, 1.5])):
        for seed, nll in enumerate(values):
            finished(tmp_path / "sweep" / f"lr-{lr}_seed-{seed}", nll, seed, lr)
    finished(tmp_path / "sweep" / "alone", 2.0, 7, 0.3)
    finished(tmp_path / "sweep" / "broken", 2.0, 0, 0.1)
    (tmp_path / "sweep" / "broken" / "results.json").write_text("{")
    main(["compare", "sweep"])
    printed = capsys.readouterr()
    assert re.search("left out: .*broken/results.json was not written by a run", printed.err)
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in printed.out.splitlines()]
    table = {cells[0]: cells[1:] for cells in lines if len(cells) == 4}
    assert table[""] == ["lr-0.01_seed-*", "alone", "lr-0.1_seed-*"]
    assert table["test/nll"] == ["1.5000 ± 0.2887", "2.0000 ± 0.5000", "4.0000 ± 0.5774"]  # 0.5 / sqrt(3), 1 / sqrt(3)
    assert table["seed"] == ["0, 1, 2", "7", "0, 1, 2"]
    assert table["± over"] == ["3 seeds", "test rows", "3 seeds"]


def test_a_seed_counts_once(tmp_path, monkeypatch, capsys):
    """Repeats of the same run, and runs that went on from another seed's checkpoint, say nothing of other seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for number, (seed, trained, nll) in enumerate([(0, 0, 1.0), (0, 0, 1.0), (1, 1, 3.0), (2, 1, 3.0)]):
        finished(tmp_path / "all" / f"run{number}", nll, seed, 0.1, results={"seed": trained})
    finished(tmp_path / "all" / "none0", 2.0, "null", 0.1, results={"seed": None})
    finished(tmp_path / "all" / "none1", 2.0, "null", 0.1, results={"seed": None})
    lines, printed = compared(capsys, "all")
    assert ["test/nll", "2.0000 ± 0.4082"] in lines
    assert ["± over", "4 seeds"] in lines
    assert re.search("left out: .*run1 repeats the settings and seed=0 of .*run0\n", printed.err)
    assert re.search("left out: .*run3 repeats the settings and seed=1 of .*run2\n", printed.err)
    assert printed.err.count("left out") == 2
    assert printed.out.startswith("4 runs, the best first\n")


def test_runs_on_other_data_are_not_ranked_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name, nll, seed, path, context in (
        ("a", 3.0, 0, "one.csv", "age"),
        ("b", 1.0, 0, "two.csv", "age"),
        ("c", 2.0, 1, "one.csv", "[age]"),
        ("d", 0.5, 0, "two.csv", "[size]"),
    ):
        finished(tmp_path / name, nll, seed, 0.1 * nll, f"data:\n  path: {path}\n  context: {context}\n")
    lines, printed = compared(capsys, "a", "b", "c", "d")
    head = next(cells for cells in lines if "c" in cells)
    assert head == ["", "c", "a", "b", "d"]
    assert printed.out.startswith("4 runs on 3 data sets, whose values can't be compared; the best on each first\n")
    assert ["data.context", "['age']", "['age']", "['age']", "['size']"] in lines


def test_columns_are_wide_enough_to_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    settings = [f"{name}: {name}{{}}\n" for name in "pqrs"]
    for number in range(5):
        finished(tmp_path / f"a_long_name_{number}", number, 0, number, "".join(settings).replace("{}", str(number)))
    lines, printed = compared(capsys, ".")
    names = [cell for cells in lines if cells[:1] == [""] for cell in cells[1:]]
    assert names == [f"a_long_name_{number}" for number in range(5)]
    assert max(map(len, printed.out.splitlines())) <= 60
    assert printed.out.count("the best first") == 1


def test_what_a_resumed_run_took_is_not_shown_as_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "a", 1.0, 0, 0.1, results={"resumed_at_step": 2})
    finished(tmp_path / "b", 1.0, 0, 0.2)
    lines, _ = compared(capsys, "a", "b")
    assert ["seconds", "1 since step 2", "1"] in lines


def test_a_group_is_shown_once_although_the_task_takes_it_too(tmp_path, monkeypatch, capsys):
    """And an argument of the task that differs from the group's is shown beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name, rows, own in (("first", 8, 8), ("second", 64, 64)):
        finished(tmp_path / name, 1.0, 0, 0.1)
        of_task = f"  lr: 0.1\n  objective:\n    coupling:\n      max_rows: {rows}\n    path:\n      sigma: {own + 1}\n"
        groups = f"coupling:\n  max_rows: {rows}\npath:\n  sigma: 0\n"
        (tmp_path / name / "config.yaml").write_text(f"seed: 0\ntask:\n{of_task}{groups}")
    main(["compare", "first", "second"])
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {cells[0]: cells[1:] for cells in lines if len(cells) == 3}
    assert table["coupling.max_rows"] == ["8", "64"]
    assert table["task.objective.path.sigma"] == ["9", "65"]
    assert "task.objective.coupling.max_rows" not in table


def test_a_stopped_run_of_a_sweep_says_how_it_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """And one checkpoint for all of them, which would make copies of one run, is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stopping.py").write_text(
        "import lightning as L\n"
        "class Stop(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 3:\n"
        "            raise KeyboardInterrupt\n"
    )

    def swept(*settings):
        monkeypatch.setattr(sys, "argv", ["divflow", "train", "-m", *SMALL, "task=flow_matching", *settings])
        main(sys.argv[1:])

    with pytest.raises(SystemExit) as ended:
        swept("seed=1,2", "+callbacks.stop._target_=stopping.Stop")
    assert ended.value.code == 130
    said = capsys.readouterr().err
    (last,) = tmp_path.rglob("last.ckpt")
    assert "stopped after 3 steps; this was the run seed=1 of a sweep" in said
    assert f"the same command without -m, with seed=1 ckpt_path={last}. Sweep the values that are left" in said
    for choice in ("seed=1,2", "network.hidden=[16],[8]"):
        with pytest.raises(SystemExit):
            swept(choice, f"ckpt_path={last}")
        name = choice.partition("=")[0]
        assert f"every run of a sweep over {name} go on from one run, as a copy" in capsys.readouterr().err
    assert not list(tmp_path.rglob("results.json"))
    swept("seed=1", f"ckpt_path={last},{last}")
    assert [json.loads(it.read_text())["resumed_at_step"] for it in tmp_path.rglob("results.json")] == [2, 2]


def test_one_failing_run_of_a_sweep_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "-m", *SMALL, "solver.method=foo,dopri5", "callbacks.best=null"])
    assert ended.value.code == 1
    assert "error: unknown solver method 'foo'" in capsys.readouterr().err
    (done,) = (tmp_path / "outputs" / "sweeps").glob("*/*/results.json")
    assert done.parent.name == "method-dopri5"


def test_an_output_that_can_not_be_written_is_reported_before_the_work(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr("divflow.cli.evaluate.load_trained", None)  # is not come to
    for out in ("file/log_prob.csv", "folder.csv", "/proc/log_prob.csv"):
        with pytest.raises(SystemExit, match=rf"out={out} can't be written \(.+\)\. Choose another file by out="):
            main(["evaluate", f"ckpt_path={runs}/exact/checkpoints/best.ckpt", f"out={out}", "overwrite=true"])


def test_a_solver_that_is_none_is_reported_before_the_checkpoint_is_read(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("divflow.cli.trained.read_checkpoint", None)  # is not come to
    for command in ("evaluate", "sample"):
        with pytest.raises(SystemExit, match="rtol must be a positive, finite number, but is -1"):
            main(
                [
                    command,
                    f"ckpt_path={runs}/exact/checkpoints/best.ckpt",
                    "solver=dopri5",
                    "solver.rtol=-1",
                    "out=x.csv",
                ]
            )


def test_what_can_not_be_written_at_the_end_is_kept_elsewhere(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    whole = os.replace

    def full(source, target):
        if "there" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", f"ckpt_path={runs}/exact/checkpoints/best.ckpt", "out=there/log_prob.csv"])
    kept = re.search(r"could not be written \(No space left on device\)\. It is saved as (\S+)", ended.value.code)
    assert len(pd.read_csv(kept[1])) == 30
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("count", [3, -1])
def test_the_best_of_several_is_the_best(tmp_path, count):
    """By a value that is the step, which the first is the best of."""
    cfg = config(*SMALL, "trainer.max_steps=8", f"callbacks.best.save_top_k={count}", "callbacks.best.monitor=val/nll",
                 "+callbacks.best.mode=max", "network.zero_init=false", f"output_dir={tmp_path}")  # fmt: skip
    results = train(cfg)
    values = pd.read_csv(tmp_path / "metrics.csv").dropna(subset="val/nll")
    best = values["val/nll"].idxmax()
    np.testing.assert_allclose(results["val/nll"], values["val/nll"][best], rtol=1e-6)
    kept = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["global_step"] == values["step"][best] + 1
    assert kept["global_step"] < 8  # else it would say nothing
    steps = sorted(values["step"][values["val/nll"].nlargest(count if count > 0 else 4).index] + 1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "best.ckpt", "last.ckpt", *(f"best-{step}.ckpt" for step in steps),
    }  # fmt: skip


def test_a_run_ends_with_a_validation(tmp_path):
    train(config(*SMALL, "trainer.max_steps=3", "trainer.val_check_interval=100", f"output_dir={tmp_path}/a"))
    assert torch.load(tmp_path / "a" / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 3
    steps = ["trainer.max_steps=-1", "+trainer.max_epochs=1", "trainer.val_check_interval=100"]
    train(config(*SMALL, *steps, f"output_dir={tmp_path}/b"))
    assert torch.load(tmp_path / "b" / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 4


def test_a_checkpoint_gets_one_number_whoever_loads_it(tmp_path):
    """Averaged weights, also where a run that goes on has no step left to train."""
    cfg = config(*SMALL, "callbacks.average.decay=0.9", "network.zero_init=false", f"output_dir={tmp_path}/run")
    train(cfg)
    moved = tmp_path / "moved.ckpt"
    shutil.copy(tmp_path / "run" / "checkpoints" / "best.ckpt", moved)
    again = train(
        config(*SMALL, "trainer.max_steps=0", "task.scheduler.T_max=4", "callbacks.average.decay=0.9", "network.zero_init=false",
               f"ckpt_path={moved}", f"output_dir={tmp_path}/again")
    )  # fmt: skip
    rows = instantiate(cfg.data, _convert_="all").test.rows
    loaded = -divflow.load(moved).log_prob(rows).mean().item()
    np.testing.assert_allclose(again["test/nll"], loaded, rtol=1e-6)
    state = torch.load(moved, weights_only=True)
    current = -divflow.load(moved, weights="current").log_prob(rows).mean().item()
    assert current != loaded
    for weights, expected in (("current", current), ("averaged", loaded)):
        results = train(config(*SMALL, "trainer.max_steps=0", "task.scheduler.T_max=4", "network.zero_init=false", f"weights={weights}",
                               f"ckpt_path={moved}", f"output_dir={tmp_path}/{weights}"))  # fmt: skip
        np.testing.assert_allclose(results["test/nll"], expected, rtol=1e-6)
        main(["evaluate", f"ckpt_path={moved}", f"weights={weights}", f"out={tmp_path}/{weights}.csv", *DATA])
        np.testing.assert_allclose(-pd.read_csv(tmp_path / f"{weights}.csv")["log_prob"].mean(), expected, rtol=1e-5)
        start = train(config(*SMALL, f"init_from={moved}", f"weights={weights}", "task.optimizer.lr=0",
                             "callbacks.average=null", f"output_dir={tmp_path}/from_{weights}"))  # fmt: skip
        np.testing.assert_allclose(start["test/nll"], expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="weights must be averaged or current, but is 'best'"):
        divflow.load(moved, weights="best")
    differ = [not torch.equal(state["state_dict"][name], value) for name, value in state["current_model_state"].items()]
    assert any(differ)  # else it would say nothing

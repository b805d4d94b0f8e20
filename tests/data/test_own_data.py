"""A LightningDataModule of one's own, chosen by the command: dicts, labels, masks and weights, in one process or two."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from run import FAST, config, run_here

import divflow
from divflow.data.batch import DataError
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError

MODULE = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, count, seed):
        noise = torch.Generator().manual_seed(seed)
        self.label = torch.randint(0, 3, (count,), generator=noise)
        self.night = torch.rand(count, generator=noise) < 0.5
        self.x = torch.randn(count, 2, generator=noise) + self.label[:, None]
        self.w = torch.rand(count, generator=noise)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"image": self.x[i], "label": self.label[i], "night": self.night[i], "w": self.w[i], "file": f"{i}.png"}


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(Rows(64, 0), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Rows(20, 1), batch_size=8)

    def test_dataloader(self):
        return DataLoader(Rows(20, 2), batch_size=8)


class Untested(Data):
    test_dataloader = L.LightningDataModule.test_dataloader


class Velocity(nn.Module):
    # v = m[label] by day and nothing by night: the flow of N(m[label], 1)

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(3, 2))

    def forward(self, t, x, context):
        assert context["label"].dtype == torch.int64 and context["night"].dtype == torch.bool
        return (self.m[context["label"]] * ~context["night"][:, None]).expand_as(x) + 0 * x
"""
KEYS = "data.keys={x: image, context: [label, night], weight: w}"
# One step by the gradient alone, from m = 0: to sum over day rows of w x / sum of all w, for each label.
ONE_STEP = [
    *(it for it in FAST if not it.startswith(("network", "trainer.max_steps", "trainer.val_check_interval"))),
    *(
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "trainer.gradient_clip_val=null",
        "callbacks.average=null",
    ),
    *("task.optimizer._target_=torch.optim.SGD", "task.optimizer.lr=1.0"),
    *("data=custom", "data._target_=my_data.Data", KEYS, "network=custom", "network._target_=my_data.Velocity"),
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    yield tmp_path
    sys.modules.pop("my_data", None)


def reached(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["density.flow.velocity.m"]


def true_step():
    from my_data import Rows

    rows = Rows(64, 0)
    counted = [rows.w * (rows.label == i) * ~rows.night for i in range(3)]
    return torch.stack([weight @ rows.x for weight in counted]) / rows.w.sum()


def test_a_step_by_the_weights_of_dicts_and_what_is_loaded_back(own):
    run_here(*ONE_STEP, "+data.batch_size=64", f"output_dir={own}/run")
    torch.testing.assert_close(reached(own / "run"), true_step(), rtol=1e-4, atol=1e-5)
    from my_data import Rows, Velocity

    density, test = divflow.load(own / "run" / "checkpoints" / "last.ckpt", allow=[Velocity]), Rows(20, 2)
    context = {"label": test.label, "night": test.night}
    mean = density.flow.velocity.m.detach()[test.label] * ~test.night[:, None]
    nll = ((test.x - mean) ** 2).sum(dim=1) / 2 + torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(-density.log_prob(test.x, context).detach(), nll, rtol=1e-4, atol=1e-4)
    metrics = json.loads((own / "run" / "results.json").read_text())["metrics"]
    assert metrics["test/nll"] == pytest.approx(((test.w * nll).sum() / test.w.sum()).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["data.keys=null"], DataError, r"the keys 'image', 'label', 'night', 'w', 'file'.*data\.keys=\{x: image\}"),
        (["data.keys={x: picture}"], DataError, "keys name 'picture' as x, but a batch has the keys 'image'"),
        (["data.keys=image"], DataError, "keys must name x.*but is 'image'"),
        (["data._target_=my_data.Untested"], DataError, "Untested has no test_dataloader"),
        (["data._target_=my_data.Rows", "~data.batch_size", "+data.count=3", "+data.seed=0"], DataError, "made a Rows"),
        (
            ["network=mlp", "~network._target_", "+network._target_=divflow.networks.MLP"],
            ConfigError,
            "features.*int64.*network=custom",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(own, change, error, message):
    given = [it for it in ONE_STEP if not (change[0].startswith("network=") and it.startswith("network"))]
    with pytest.raises(error, match=message):
        train(
            config(
                *given,
                "+data.batch_size=64",
                *change[:1] if change[0].startswith("network=") else change,
                f"output_dir={own}/run",
            )
        )
    assert not (own / "run").exists()


@pytest.mark.slow
def test_the_commands_as_they_are_typed(own):
    def typed(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "divflow", *arguments], capture_output=True, text=True, check=False, cwd=own
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    typed("train", *ONE_STEP, "+data.batch_size=64", "output_dir=run")
    shown = typed(
        "evaluate", "ckpt_path=run/checkpoints/last.ckpt", "allow=[my_data.Velocity,my_data.Data]", "batch_size=7"
    )
    metrics = json.loads((own / "run" / "results.json").read_text())["metrics"]
    assert f"{metrics['test/nll']:.4f} ± {metrics['test/nll_standard_error']:.4f}" in shown
    assert len((own / "log_prob.csv").read_text().splitlines()) == 21
    given = ("allow=[my_data.Velocity]", "context={label: 2, night: false}", "num_samples=2000", "out=samples.npy")
    typed("sample", "ckpt_path=run/checkpoints/last.ckpt", *given)
    mean = torch.as_tensor(np.load(own / "samples.npy")).mean(dim=0).float()
    torch.testing.assert_close(mean, true_step()[2], rtol=0, atol=0.15)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(own):
    """The weights' sum is that of both: 32 rows each, whose sums of weights differ."""
    command = [
        sys.executable,
        "-m",
        "divflow",
        "train",
        *(it for it in ONE_STEP if it != "device=cpu"),
        "device=multi_process_cpu",
    ]
    done = subprocess.run(
        [*command, "+data.batch_size=32", "output_dir=run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=own,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(reached(own / "run"), true_step(), rtol=1e-4, atol=1e-5)

"""Several loaders in validation and test: values of each, by Lightning's names."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from run import FAST, SMALL_TOY, config
from small_tasks import TASKS, quick, trainer
from torch.utils.data import DataLoader

from divflow.data import Toy
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError


class Two(Toy):
    """The rows of validation in two loaders."""

    def val_dataloader(self):
        rows = self.val.rows
        return [DataLoader(rows[:10], batch_size=4), DataLoader(rows[10:] + 1, batch_size=4)]

    def test_dataloader(self):
        return dict(zip(("near", "far"), self.val_dataloader(), strict=True))


def loaders():
    rows = torch.randn(30, 2)
    return [DataLoader(rows[:12], batch_size=5), DataLoader(3 + rows, batch_size=5)]


@pytest.mark.parametrize("name", quick("score"))
def test_values_of_each_loader_are_those_of_it_alone(name, tmp_path):
    task, both, run = TASKS[name](), loaders(), trainer(tmp_path)
    for stage, evaluate in {"val": run.validate, "test": run.test}.items():
        value = f"{stage}/{'loss' if name == 'score' else 'nll'}"
        found = evaluate(task, both, verbose=False)[0]
        assert value not in found
        for i, loader in enumerate(both):
            alone = evaluate(task, loader, verbose=False)[0]
            assert not [key for key in alone if "dataloader" in key]
            assert found[f"{value}/dataloader_idx_{i}"] == pytest.approx(alone[value], rel=1e-5), stage


@pytest.mark.slow
def test_noise_is_of_the_loader_and_batch(tmp_path):
    """Two loaders of the same rows: the same density, and other noise."""
    rows = torch.randn(12, 2)
    twice = [DataLoader(rows, batch_size=5) for _ in range(2)]
    task, run = TASKS["score over an SDE"](), trainer(tmp_path)
    first, second = (run.validate(task, twice, verbose=False)[0] for _ in range(2))
    assert first == second
    names = [f"val/{name}/dataloader_idx_{i}" for name in ("nll", "loss") for i in range(2)]
    nll, same_nll, loss, other_loss = (first[name] for name in names)
    assert nll == same_nll
    assert loss != other_loss
    assert run.validate(task, twice[0], verbose=False)[0]["val/loss"] == loss


def test_a_checkpoint_follows_one_of_them(tmp_path):
    def fit(monitor):
        best = ModelCheckpoint(tmp_path / monitor.replace("/", "_"), monitor=monitor)
        run = trainer(tmp_path, callbacks=[best], enable_checkpointing=True)
        run.fit(TASKS["score"](), DataLoader(torch.randn(48, 2), batch_size=16), loaders())
        return best.best_model_score, run.callback_metrics[monitor]

    followed, logged = fit("val/loss/dataloader_idx_1")
    assert followed == logged
    with pytest.raises(MisconfigurationException, match="dataloader_idx_0"):
        fit("val/loss")


@pytest.mark.slow
def test_by_the_command(tmp_path):
    settings = [*FAST, *SMALL_TOY, "data._target_=test_loaders.Two"]
    best = "callbacks.best.monitor=val/nll/dataloader_idx_1"
    results = train(config(*settings, best, f"output_dir={tmp_path}/a"))
    assert {"test/nll/dataloader_idx_0", "test/nll/dataloader_idx_1", "val/nll/dataloader_idx_1"} <= set(results)
    with pytest.raises(ConfigError, match="val/nll.*dataloader_idx_0"):
        train(config(*settings, f"output_dir={tmp_path}/b"))

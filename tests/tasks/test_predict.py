"""`trainer.predict` of a task: the log-density of each sample, as validation has it."""

import pytest
import torch
from closed_forms import LinearVelocity, carried_normal
from lightning.pytorch.callbacks import BasePredictionWriter
from small_tasks import DENSITIES, TASKS, moons, quick, trainer
from torch.utils.data import DataLoader

from divflow.divergence import Hutchinson
from divflow.flow import ContinuousFlow
from divflow.tasks import FlowTask, TaskError


def test_log_densities_of_a_closed_form(tmp_path):
    truth = carried_normal(LinearVelocity((2,)), 0.0, 1.0)
    x = truth.sample((25,))
    task = FlowTask(ContinuousFlow(LinearVelocity((2,)), 2).double())
    parts = trainer(tmp_path).predict(task, DataLoader(x, batch_size=10))
    assert [part.shape for part in parts] == [(10,), (10,), (5,)]
    torch.testing.assert_close(torch.cat(parts), truth.log_prob(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", quick("flow matching", of=DENSITIES))
def test_the_test_rows_of_a_data_module_as_the_test_has_them(name, tmp_path):
    task, data = TASKS[name](), moons(eval_batch_size=8)
    run = trainer(tmp_path)
    found = torch.cat(run.predict(task, datamodule=data))
    assert found.shape == (20,)
    assert run.test(task, datamodule=data, verbose=False)[0]["test/nll"] == pytest.approx(
        -found.mean().item(), rel=1e-6
    )


@pytest.mark.slow
def test_an_estimate_is_that_of_validation(tmp_path):
    task = FlowTask(ContinuousFlow(LinearVelocity((2,), torch.float32), 2, estimator=Hutchinson()))
    loader = DataLoader(torch.randn(20, 2), batch_size=8)
    run = trainer(tmp_path)
    first, second = (torch.cat(run.predict(task, loader)) for _ in range(2))
    assert torch.equal(first, second)
    assert run.validate(task, loader, verbose=False)[0]["val/nll"] == pytest.approx(-first.mean().item(), rel=1e-6)


def test_a_score_without_sde_has_none(tmp_path):
    with pytest.raises(TaskError, match=r"log-densities, but a score without SDE has none\. Use task\.density\.score"):
        trainer(tmp_path).predict(TASKS["score"](), datamodule=moons())


class Written(BasePredictionWriter):
    def __init__(self, folder):
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        rows = [row for batch in batch_indices[0] for row in batch]
        torch.save((rows, torch.cat(predictions)), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_prediction_writer_has_every_row_once(processes, tmp_path):
    torch.manual_seed(0)
    task, data = TASKS["flow"](), moons(eval_batch_size=6, num_test=21)
    data.setup("predict")
    several = {"devices": processes, "strategy": "ddp_fork" if processes > 1 else "auto"}
    trainer(tmp_path, callbacks=[Written(tmp_path)], **several).predict(task, datamodule=data, return_predictions=False)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    rows = [row for part, _ in parts for row in part]
    assert sorted(rows) == list(range(21))
    expected = task.evaluated_density.log_prob(data.test.rows)
    torch.testing.assert_close(torch.cat([found for _, found in parts]), expected[rows])

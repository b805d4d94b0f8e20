"""Tasks that have been fitted: copied, fitted again, averaged by Lightning's callbacks, and no graph kept."""

import copy
import gc
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from small_tasks import TASKS, moons, quick, trainer


class Graphs(Callback):
    """What of a step with a graph is alive once the next one begins."""

    def __init__(self, task):
        self.steps, self.alive = [], []
        original = task.loss

        def loss(batch):
            others = with_graph()  # of whatever ran in this process before; kept, so that their ids stay theirs
            known = set(map(id, others))
            found = original(batch)
            self.steps.append(weakref.WeakSet(it for it in with_graph() if id(it) not in known))
            return found

        task.loss = loss

    def on_train_batch_start(self, *arguments):
        gc.collect()
        self.alive += [it for step in self.steps for it in step]


def with_graph():
    return [it for it in gc.get_objects() if isinstance(it, torch.Tensor) and it.grad_fn is not None]


@pytest.mark.parametrize("name", quick("flow", "score"))
def test_no_graph_outlives_its_step(name, tmp_path):
    task = TASKS[name]()
    graphs = Graphs(task)
    trainer(tmp_path, callbacks=[graphs], limit_val_batches=0).fit(task, datamodule=moons())
    assert len(graphs.steps) == 3
    assert not graphs.alive
    gc.collect()
    assert not [it for step in graphs.steps for it in step]


@pytest.mark.parametrize("name", quick())
def test_a_copy_after_fit_is_a_task_of_its_own(name, tmp_path):
    task, data = TASKS[name](), moons()
    trainer(tmp_path).fit(task, datamodule=data)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    copied = copy.deepcopy(task)
    trainer(tmp_path).fit(copied, datamodule=data)
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in copied.state_dict().items())
    assert {id(it) for it in copied.evaluated_density.parameters()} == {id(it) for it in copied.density.parameters()}


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "equal weights": WeightAveraging,
}


@pytest.mark.parametrize("average", quick("EMA", of=AVERAGES))
@pytest.mark.parametrize("name", quick("score", of=["flow", "score"]))
def test_averaged_in_a_first_and_in_a_second_fit(name, average, tmp_path):
    task, data = TASKS[name](), moons()
    for _ in range(2):
        before = [value.clone() for value in task.parameters()]
        trainer(tmp_path, callbacks=[AVERAGES[average]()], max_steps=-1, max_epochs=3).fit(task, datamodule=data)
        assert not any(torch.equal(*pair) for pair in zip(before, task.parameters(), strict=True))
        assert all(torch.isfinite(value).all() for value in task.parameters())

"""Optimizers that train one set of weights and leave another, such as schedule-free ones: each is where it belongs."""

import functools
import importlib

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from run import FAST, SMALL_TOY, config
from small_tasks import TASKS, moons, quick, trainer

from divflow import load
from divflow.runs.experiment import train
from divflow.tasks import FlowTask

# Batches of divflow's data modules are found again.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{it}") for it in ("You're resuming from a checkpoint", "Be aware that when")
]


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): gradients at y = (1 - beta) z + beta x, where x is the mean of all z."""

    def __init__(self, params, lr=0.05, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0})
        self.trains = False  # which is not saved

    @torch.no_grad()
    def _interpolate(self, trains):
        if trains != self.trains:
            for group in self.param_groups:
                weight = 1 - group["beta"] if trains else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
        self.trains = trains

    def train(self):
        self._interpolate(True)

    def eval(self):
        self._interpolate(False)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.trains, "a step in evaluation mode"
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["steps"])
                p.copy_(x.lerp(z, 1 - group["beta"]))
        return loss


class Seen(Callback):
    """The mode of the optimizer in training, in validation and after it."""

    def __init__(self):
        self.wrong = []

    def check(self, place, trainer, task, trains):
        (optimizer,) = trainer.optimizers
        self.wrong += [] if optimizer.trains == trains else [place]

    def on_train_batch_start(self, trainer, task, *arguments):
        self.check("train", trainer, task, True)

    def on_train_batch_end(self, trainer, task, *arguments):
        self.check("train", trainer, task, True)

    def on_validation_batch_start(self, trainer, task, *arguments):
        self.check("validation", trainer, task, False)

    def on_validation_end(self, trainer, task):
        self.check("validation", trainer, task, False)

    def on_fit_end(self, trainer, task):
        self.check("fit", trainer, task, False)


def mean_of_z(task, batches, lr=0.05, beta=0.9):
    """The same in a loop of one's own: x after each step."""
    parameters = list(task.parameters())
    z, x = [p.detach().clone() for p in parameters], [p.detach().clone() for p in parameters]
    for n, batch in enumerate(batches, 1):
        with torch.no_grad():
            for p, a, b in zip(parameters, z, x, strict=True):
                p.copy_((1 - beta) * a + beta * b)
        loss = task.objective(task.density.score_field, batch).mean()
        for g, a, b in zip(torch.autograd.grad(loss, parameters), z, x, strict=True):
            a -= lr * g
            b += (a - b) / n
    return x


# Of one that leaves weights so far from those of training that going from one to the other and back rounds.
FAR = functools.partial(Averaging, lr=0.3, beta=0.3)
STEPS = {"max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}


def test_what_is_left_is_the_mean(tmp_path):
    batches = torch.randn(5, 8, 2)
    task, again = TASKS["score"](optimizer=Averaging), TASKS["score"]()
    again.load_state_dict(task.state_dict())
    seen = Seen()
    loader = torch.utils.data.DataLoader(batches.flatten(0, 1), batch_size=8)
    held_out = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=8)
    trainer(tmp_path, max_steps=5, callbacks=[seen], **STEPS).fit(task, loader, held_out)
    assert not seen.wrong
    for found, expected in zip(task.parameters(), mean_of_z(again, batches), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", quick("score"))
def test_checkpoints_hold_what_was_validated_and_what_is_trained(name, tmp_path):
    """The best of them has the validation's very value; a run goes on from one as if it had not been stopped, whenever it was saved."""
    monitor = "val/loss" if name == "score" else "val/nll"
    run_of = functools.partial(trainer, tmp_path, max_steps=6, **STEPS)
    best = ModelCheckpoint(tmp_path, filename="best", monitor=monitor)
    third = ModelCheckpoint(
        tmp_path, filename="{step}", auto_insert_metric_name=False, every_n_train_steps=3, save_top_k=-1
    )
    saved = {"callbacks": [best, third], "enable_checkpointing": True}
    torch.manual_seed(0)
    straight, run = TASKS[name](optimizer=FAR), run_of(**saved)
    run.fit(straight, datamodule=moons())
    found = run.validate(straight, datamodule=moons(), ckpt_path=tmp_path / "best.ckpt", verbose=False)[0]
    assert found[monitor] == best.best_model_score
    torch.manual_seed(0)
    unsaved, resumed = TASKS[name](optimizer=FAR), TASKS[name](optimizer=FAR)
    run_of(limit_val_batches=0).fit(unsaved, datamodule=moons())
    rest = run_of(limit_val_batches=0)
    rest.fit(resumed, datamodule=moons(), ckpt_path=tmp_path / "3.ckpt", weights_only=True)
    assert rest.global_step == 6
    # Neither validation nor saving changes what is trained.
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in unsaved.state_dict().items())


@pytest.mark.slow
def test_a_second_fit_begins_where_the_first_ended(tmp_path):
    task = TASKS["flow matching"](optimizer=Averaging)
    trainer(tmp_path).fit(task, datamodule=moons())
    before = [value.detach().clone() for value in task.parameters()]
    starts = []

    class First(Callback):
        def on_train_batch_start(self, trainer, task, *arguments):
            starts.append([value.detach().clone() for value in task.parameters()])

    trainer(tmp_path, callbacks=[First()]).fit(task, datamodule=moons())
    assert all(torch.equal(*pair) for pair in zip(before, starts[0], strict=True))


RUN = [*FAST, *SMALL_TOY, "task.scheduler=null", "callbacks.average=null", "callbacks.last.every_n_steps=3"]
RUN += ["trainer.val_check_interval=4", "~task.optimizer.weight_decay", "task.optimizer.lr=0.05"]


def by_command(folder, optimizer, *more):
    return train(config(*RUN, f"task.optimizer._target_={optimizer}", f"output_dir={folder}", *more))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["test_optimizer_modes.Averaging", "schedulefree.AdamWScheduleFree"])
def test_by_the_command(optimizer, tmp_path):
    pytest.importorskip(optimizer.partition(".")[0])
    results = by_command(tmp_path / "straight", optimizer, "trainer.max_steps=8")
    by_command(tmp_path / "half", optimizer, "trainer.max_steps=3")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    assert by_command(tmp_path / "rest", optimizer, "trainer.max_steps=8", f"ckpt_path={last}") == results
    best = tmp_path / "straight" / "checkpoints" / "best.ckpt"
    module, _, cls = optimizer.rpartition(".")
    allowed = [getattr(importlib.import_module(module), cls)]
    data, task = moons(num_train=64, num_val=20, num_test=30), FlowTask.load_from_checkpoint(best, allow=allowed)
    found = trainer(tmp_path).test(task, datamodule=data, verbose=False)[0]
    assert found["test/nll"] == pytest.approx(results["test/nll"], rel=1e-6)
    saved = torch.load(best)
    state = load(best).state_dict()
    assert all(torch.equal(value, saved["state_dict"][f"density.{key}"]) for key, value in state.items())
    trains = saved["training_weights"]
    assert not any(torch.equal(value, saved["state_dict"][key]) for key, value in trains.items() if value.abs().sum())

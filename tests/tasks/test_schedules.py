"""Learning rate schedules of tasks: by steps of the optimizer, or after validations; resumed bit for bit."""

import csv
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from run import FAST, SMALL_TOY, config
from small_tasks import TASKS, moons, quick, trainer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from divflow.runs.experiment import train
from divflow.tasks import TaskError

# Batches of divflow's data modules are found again.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{it}") for it in ("You're resuming from a checkpoint", "Be aware that when")
]

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def halved(step):
    return 0.5**step


SCHEDULES = {
    "cosine": functools.partial(CosineAnnealingLR, T_max=6),
    "one cycle": functools.partial(OneCycleLR, max_lr=0.1, total_steps=6),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 4)], milestones=[2]
    ),
    "lambda": functools.partial(LambdaLR, lr_lambda=halved),
}


class Rates(Callback):
    """The learning rate of each step of the optimizer, and the value of each validation."""

    def __init__(self, monitor="val/nll"):
        self.monitor, self.rates, self.values = monitor, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.values.append(trainer.callback_metrics[self.monitor].item())


def by_hand(make, steps):
    """torch's own loop."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)])
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", quick("cosine", of=SCHEDULES))
def test_schedules_step_with_the_optimizer_and_go_on(name, tmp_path):
    """Six steps of two batches each, and the same after a stop."""
    make, expected = SCHEDULES[name], by_hand(SCHEDULES[name], 6)
    more = {"accumulate_grad_batches": 2, "max_epochs": -1, "limit_val_batches": 0, "max_steps": 6}
    straight, rates = TASKS["flow matching"](optimizer=SGD, scheduler=make), Rates()
    half = ModelCheckpoint(
        tmp_path, filename="{step}", auto_insert_metric_name=False, every_n_train_steps=3, save_top_k=-1
    )
    run = trainer(tmp_path, callbacks=[rates, half], enable_checkpointing=True, **more)
    run.fit(straight, datamodule=moons(num_train=64))
    assert rates.rates == expected
    resumed, rest = TASKS["flow matching"](optimizer=SGD, scheduler=make), Rates()
    run = trainer(tmp_path, callbacks=[rest], **more)
    run.fit(resumed, datamodule=moons(num_train=64), ckpt_path=tmp_path / "3.ckpt", weights_only=True)
    assert rest.rates == expected[3:]
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in straight.state_dict().items())


@pytest.mark.slow
def test_rates_in_logs_are_those_of_the_steps(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [LearningRateMonitor("step")]
    more = {"logger": logger, "callbacks": callbacks, "log_every_n_steps": 1, "limit_val_batches": 0}
    run = trainer(tmp_path, max_steps=6, max_epochs=-1, **more)
    run.fit(TASKS["flow matching"](optimizer=SGD, scheduler=SCHEDULES["lambda"]), datamodule=moons())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")] == pytest.approx(by_hand(SCHEDULES["lambda"], 6))


PLATEAU = functools.partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.05)


def plateaued(values):
    """torch's own schedule of these values: the rate after each."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)])
    scheduler, rates = PLATEAU(optimizer), []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", quick("score"))
def test_a_plateau_is_one_of_validations(name, tmp_path):
    """Validations every two steps, of batches of which two make a step; the best checkpoint holds the rate that follows."""
    monitor = "val/loss" if name == "score" else "val/nll"
    rates = Rates(monitor)
    saved = ModelCheckpoint(tmp_path, monitor=monitor, save_top_k=-1, filename="{step}", auto_insert_metric_name=False)
    more = {"accumulate_grad_batches": 2, "val_check_interval": 4, "check_val_every_n_epoch": None}
    run = trainer(tmp_path, max_steps=8, max_epochs=-1, callbacks=[rates, saved], enable_checkpointing=True, **more)
    run.fit(TASKS[name](optimizer=SGD, scheduler=PLATEAU), datamodule=moons(num_train=64))
    assert len(rates.values) == 4
    after = plateaued(rates.values)
    assert rates.rates == [rate for rate in [0.1, *after[:3]] for _ in range(2)]
    kept = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert kept["lr_schedulers"][0]["last_epoch"] == 2
    assert kept["optimizer_states"][0]["param_groups"][0]["lr"] == after[1]


def test_a_plateau_of_what_is_not_there(tmp_path):
    task, data = TASKS["score"](scheduler=PLATEAU, monitor="val/foo"), moons()
    with pytest.raises(
        TaskError, match=r"monitor='val/foo', but validation logs no such value\. Choose one of .*val/loss"
    ):
        trainer(tmp_path).fit(task, datamodule=data)
    with pytest.raises(TaskError, match=r"after each validation, but there is none.*limit_val_batches=0"):
        trainer(tmp_path, limit_val_batches=0).fit(TASKS["score"](scheduler=PLATEAU), datamodule=data)


def test_one_cycle_that_is_too_short(tmp_path):
    task = TASKS["score"](scheduler=functools.partial(OneCycleLR, max_lr=0.1, total_steps=2))
    with pytest.raises(
        TaskError, match=r"total_steps=2, after which it can't step, but training takes 3 steps\. Give it total_steps=3"
    ):
        trainer(tmp_path).fit(task, datamodule=moons())


BY_COMMAND = [
    *FAST,
    *SMALL_TOY,
    "task.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau",
    "~task.scheduler.T_max",
    "+task.scheduler.patience=0",
    "+task.scheduler.threshold=10",  # of which every validation falls short
    "callbacks.best.save_top_k=-1",
]


@pytest.mark.slow
def test_a_plateau_by_the_command_goes_on_bit_for_bit(tmp_path):
    train(config(*BY_COMMAND, "trainer.max_steps=8", f"output_dir={tmp_path}/straight"))
    train(config(*BY_COMMAND, "trainer.max_steps=4", f"output_dir={tmp_path}/half"))
    half = tmp_path / "half" / "checkpoints" / "last.ckpt"
    train(config(*BY_COMMAND, "trainer.max_steps=8", f"ckpt_path={half}", f"output_dir={tmp_path}/rest"))
    ends = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("straight", "rest")]
    for name in ("current_model_state", "state_dict"):
        assert all(torch.equal(value, ends[1][name][key]) for key, value in ends[0][name].items())
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert ends[0]["lr_schedulers"][0]["last_epoch"] == 4  # validations
    with pytest.raises(TaskError, match="val/gap_standard_error.*Choose one of .*val/gap"):
        train(config(*BY_COMMAND, "task.monitor=val/gap_standard_error", f"output_dir={tmp_path}/none"))


def test_what_the_finder_finds_is_trained_with(tmp_path):
    cosine = functools.partial(CosineAnnealingLR, T_max=50)
    task, data = TASKS["score"](optimizer=SGD, scheduler=cosine), moons()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    run = trainer(tmp_path, max_steps=2)
    found = Tuner(run).lr_find(task, datamodule=data, num_training=30, min_lr=1e-4, max_lr=0.1)
    assert task.lr == found.suggestion() != 0.1
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    rates = Rates()
    trainer(tmp_path, max_steps=2, callbacks=[rates], limit_val_batches=0).fit(task, datamodule=data)
    assert rates.rates[0] == task.lr


@pytest.mark.slow
def test_the_batch_size_is_scaled(tmp_path):
    data = moons()
    run = trainer(tmp_path, max_steps=10)
    size = Tuner(run).scale_batch_size(
        TASKS["flow matching"](), datamodule=data, max_trials=2, init_val=4, steps_per_trial=1
    )
    assert data.batch_size == size > 4

"""Tasks under the options of Lightning's trainer, in code and by the command."""

import lightning as L
import pytest
import torch
from run import FAST, SMALL_TOY, run_here
from small_tasks import TASKS, moons, quick, trainer

from divflow.tasks import TaskError

OPTIONS = {
    "fast_dev_run": {"fast_dev_run": True},
    "overfit_batches": {"overfit_batches": 2},
    "limit_val_batches": {"limit_val_batches": 0},
    "num_sanity_val_steps": {"num_sanity_val_steps": 2},
    "val_check_interval": {"val_check_interval": 0.5},
    "detect_anomaly": {"detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "gradient_clip_algorithm": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "barebones": {"barebones": True},
}
# What turns a warning of Lightning's into an error says nothing of tasks.
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:You are overriding",
    "ignore:You requested to overfit",
    "ignore:You defined a",
    "ignore:You are trying to `self.log",
)


@pytest.mark.parametrize("option", quick("fast_dev_run", "bf16-mixed", "barebones", of=OPTIONS))
@pytest.mark.parametrize("task", quick("score"))
def test_an_option_of_the_trainer(task, option, tmp_path):
    module, data, settings = TASKS[task](), moons(), OPTIONS[option]
    if option == "barebones":
        run = L.Trainer(accelerator="cpu", max_steps=2, default_root_dir=tmp_path, **settings)
    else:
        run = trainer(tmp_path, max_steps=2, **settings)
    before = [value.clone() for value in module.parameters()]
    run.fit(module, datamodule=data)
    assert run.global_step == (1 if option == "fast_dev_run" else 2)
    after = list(module.parameters())
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True) if pair[0].dtype == pair[1].dtype)
    assert all(torch.isfinite(value).all() for value in after)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_is_refused(precision, tmp_path):
    with pytest.raises(TaskError, match=f"precision='{precision}' keeps weights.*Use precision='bf16-mixed'"):
        trainer(tmp_path, precision=precision).fit(TASKS["flow"](), datamodule=moons())


@pytest.mark.slow
def test_weights_of_a_checkpoint_are_validated_and_tested(tmp_path):
    task, data = TASKS["flow matching"](), moons()
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(task, datamodule=data)
    path = run.checkpoint_callback.best_model_path
    found = run.validate(task, datamodule=data, ckpt_path=path, verbose=False)[0]["val/nll"]
    tested = run.test(task, datamodule=data, ckpt_path="best", verbose=False)[0]["test/nll"]
    with torch.no_grad():
        for value in task.parameters():
            value.zero_()
    assert run.validate(task, datamodule=data, ckpt_path=path, verbose=False)[0]["val/nll"] == found
    assert run.test(task, datamodule=data, ckpt_path="best", verbose=False)[0]["test/nll"] == tested


@pytest.mark.slow
@pytest.mark.parametrize("task", ["flow", "flow_matching", "score"])
def test_fast_dev_run_by_the_command(task, tmp_path, capsys):
    run_here(*FAST, *SMALL_TOY, f"task={task}", "+trainer.fast_dev_run=true", f"output_dir={tmp_path}")
    assert "1 steps" in capsys.readouterr().out

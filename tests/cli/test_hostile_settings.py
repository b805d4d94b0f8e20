"""Any setting with any value: the run is made, or a line reports what is wrong with it."""

import random
import re
import signal

import pytest
from omegaconf import OmegaConf
from run import FAST, SMALL_TOY, config, run_here

VALUES = [
    "null", "-1", "0", "0.5", "-0.1", "abc", "[]", "{}", "true", "nan", "inf", "1e300", "-5", "99999999999999999999999",
    "[1,abc]", "''", "foo.Bar", "{a: 1}", "64", "[-3]",
]  # fmt: skip
RUNS = {
    "flow": [],
    "score": ["task=score"],
    "flow matching": ["task=flow_matching", "coupling=optimal_transport"],
    "digits": ["data=digits", "estimator=hutchinson"],
    "particles": ["task=flow_matching", "data=dw4", "network=pair_field"],
}


def names(settings, prefix=""):
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from names(value, f"{prefix}{key}.")


def drawn(run, number):
    """One of all settings, with one of the values."""
    draw = random.Random(number)
    settings = OmegaConf.to_container(config(*run, "output_dir=x"), resolve=False)
    return f"{draw.choice([name for name in names(settings) if name != 'output_dir'])}={draw.choice(VALUES)}"


def outcome(capsys, *settings):
    """What a run says where it ends with an error; nothing where it was made."""

    def late(*_):
        raise AssertionError("it goes on for a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    code = None
    try:
        run_here(*settings)
    except SystemExit as ended:
        code = ended.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert code in (None, 1) or isinstance(code, str)
    return "" if code is None else capsys.readouterr().err + (code if isinstance(code, str) else "")


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(60))
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_any_value_of_any_setting(run, number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    override = drawn(run, number)
    toy = [] if any(setting.startswith("data=") for setting in run) else SMALL_TOY
    said = outcome(capsys, *FAST, *toy, *run, "output_dir=run", override)
    assert "Traceback" not in said, override
    assert not said or re.search(r"error: |Could not |Error ", said), (override, said)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.optimizer.lr=-0.1"], "the settings of task are refused: Invalid learning rate: -0.1"),
        (["task.optimizer.lr=null"], "task.optimizer.lr must be float | torch.Tensor, but is None"),
        (["trainer.max_steps=null"], "trainer.max_steps must be a whole number, or -1 for no limit, but is None"),
        (["trainer.max_steps=-5"], "trainer.max_steps must be a whole number, or -1 for no limit, but is -5"),
        (["trainer.val_check_interval=0"], "error: .*val_check_interval"),
        (["trainer.gradient_clip_val=abc"], "trainer.gradient_clip_val must be .*float.*, but is 'abc'"),
        (["device.accelerator=foo"], "settings of trainer, device or logger are refused: .*'foo'"),
        (["device.precision=foo"], "device.precision must be .*'bf16-mixed'.*, but is 'foo'"),
        (["callbacks=null"], "callbacks must be a mapping of settings, but is None"),
        (["callbacks.best.monitor=val/foo"], "could not find the monitored key .*val/nll"),
        (["callbacks.last.every_n_minutes=abc"], "every_n_minutes must be float | null, but is 'abc'"),
        (
            ["network.hidden=64"],
            r"network.hidden must be Sequence\[int\], but is 64. Write a list, network.hidden=\[64\]",
        ),
        (["trainer.max_steps=abc"], "trainer.max_steps must be a whole number, or -1 for no limit, but is 'abc'"),
        (["network.hidden=[-3]"], "error: .*-3"),
        (["network._target_=3"], "network._target_ must name a class or function, .*but is 3"),
        (["network._target_=foo.Bar"], "network._target_=foo.Bar can't be found: there is no module 'foo'"),
        (["estimator=null"], "Config group override must be a string or a list. Got NoneType"),
        (["data.batch_size=99999999999999999999999"], "data.batch_size=9+ is beyond the largest number of 64 bits"),
        (["task.optimizer.lr=1e300"], "task.optimizer.lr=1e\\+300 is beyond the largest number of single precision"),
        (["ckpt_path=3"], "ckpt_path must be a path, but is 3"),
        (["base=0"], "Config group override must be a string or a list. Got int"),
    ],
)
def test_what_is_wrong_is_named(overrides, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = outcome(capsys, *FAST, *SMALL_TOY, *overrides)
    assert "Traceback" not in said
    assert re.search(message, said), said

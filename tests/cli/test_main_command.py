"""The commands wherever divflow is installed: from a wheel in an empty folder, in several processes, and how they start."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import warnings
import zipfile

import built_wheel
import pytest
from hydra._internal.utils import get_args_parser
from run import FAST, ROOT, SMALL_TOY
from setuptools import find_packages

import divflow
from divflow.cli import application, main
from divflow.cli.application import config_dir
from divflow.cli.command_line import OPTIONS
from divflow.cli.mistakes import check_options
from divflow.runs.signals import Stopped, alone, heard


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel of the working tree holds, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built_wheel.build(folder)) as file:
        file.extractall(folder / "installed")
    return folder / "installed"


def printed(*command, cwd=None, path=ROOT):
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_has_the_configs_and_every_package(installed):
    def tree(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.yaml")}

    assert tree(installed / "divflow" / "configs") == tree(ROOT / "configs")
    for package in find_packages(str(ROOT), include=["divflow*"]):
        assert (installed / package.replace(".", "/") / "__init__.py").is_file()
    assert not (installed / "configs").exists()


def test_the_installed_command_is_train_py(installed, tmp_path):
    settings = ["data=digits", "output_dir=x", "--cfg=job"]
    here = printed("-m", "divflow", "train", *settings, cwd=tmp_path, path=installed)
    assert here == printed(ROOT / "train.py", *settings, cwd=tmp_path)
    assert "divflow.data.Digits" in here
    assert not list(tmp_path.iterdir())


def test_a_folder_of_ones_own_joins_the_configs(installed, tmp_path):
    (tmp_path / "mine" / "network").mkdir(parents=True)
    (tmp_path / "mine" / "network" / "tiny.yaml").write_text("_target_: divflow.networks.MLP\nhidden: [3]\n")
    output = printed(
        "-m", "divflow", "train", "--config-dir=mine", "network=tiny", "--cfg=job", cwd=tmp_path, path=installed
    )
    assert "- 3\n" in output
    (tmp_path / "mine" / "whole.yaml").write_text("answer: 42\n")
    whole = ["--config-path=mine", "--config-name=whole", "-c", "job"]  # relative to the current folder
    assert printed("-m", "divflow", "train", *whole, cwd=tmp_path, path=installed) == "answer: 42\n"


@pytest.mark.slow
def test_the_script_starts_its_further_processes(installed, tmp_path):
    """Lightning starts them by the command line: script, command and settings."""
    script = tmp_path / "divflow"
    script.write_text("import sys\nfrom divflow.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    settings = [*FAST, *SMALL_TOY, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    output = printed(script, "train", *settings, "device=multi_process_cpu", cwd=tmp_path, path=installed)
    assert output.count("negative log-likelihood") == 1
    (flow,) = (tmp_path / "outputs").glob("flow_two_moons/*/results.json")
    assert (tmp_path / "outputs" / "latest").resolve() == flow.parent


def test_help_names_the_commands_and_what_they_do(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} +\w", text, re.MULTILINE) for name in ("train", "evaluate", "sample", "compare"))


def test_the_version_is_the_packages(capsys, installed):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"divflow {divflow.__version__}\n"
    assert list(installed.glob(f"divflow-{divflow.__version__}.dist-info"))


@pytest.mark.parametrize("given", [["evalute"], []])
def test_no_such_command(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_signal_that_a_library_swallows_is_a_stop_all_the_same(number, stop):
    """As torch does with one that comes while it imports numpy."""

    def imported(swallowed):
        with heard(), alone():
            for it in swallowed:
                with contextlib.suppress(BaseException):
                    signal.raise_signal(it)
            raise ImportError("cannot load module more than once per process")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(stop):
            imported([number])
        with pytest.raises(ImportError):  # the next command knows nothing of it
            imported([])
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("runs/best.ckpt", "'runs/best.ckpt' is no setting; write ckpt_path=runs/best.ckpt"),
        ("table.csv", "write data.path=table.csv"),
        ("context={age: 41", r"can't be read; in a shell.*\"context=\{age: 41\}\""),
        ("lr=0.1", r"no group or setting lr \(did you mean task.optimizer.lr\?\)"),
        ("data.columns=height,weight", r"several values. Write a list as data.columns=\[height,weight\], or add -m"),
        ("+data.columns=a,b", r"as \+data.columns=\[a,b\]"),
        ("network.hidden=[64],[32]", r"network.hidden=\[64\],\[32\] has several values. Add -m for a run with each"),
        ("task=flow,score", "task=flow,score has several values. Add -m for a run with each of them, or give one$"),
        ("--seed=3", "divflow train has no option --seed. Settings are written without dashes: seed=3$"),
        ("data", "'data' is no setting; write data=VALUE, without a space"),
        ("-n", "no option -n. Settings are written without dashes: n=VALUE"),
    ],
)
def test_what_is_no_setting(setting, message, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match=message):
        main(["train", setting])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num_samples", "10"], "divflow sample has no option --num_samples. .* without dashes: num_samples=10$"),
        (["--num-samples=10", "seed=1"], "no option --num-samples. .*: num_samples=10$"),
        (["ckpt_path=a.ckpt", "--out", "a b.csv"], "out=a b.csv$"),
        (["--overwrite", "seed=1"], "overwrite=VALUE$"),
        (["--overwrite", "--seed", "1"], "no option --overwrite. .*: overwrite=VALUE$"),
        (["--multirunn", "seed=1,2"], r"no option --multirunn \(did you mean --multirun\?\)"),
    ],
)
def test_settings_are_no_options(given, message):
    with pytest.raises(SystemExit, match=message):
        main(["sample", *given])


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
@pytest.mark.parametrize("form", [["--data", "two_moons"], ["--data=two_moons"], ["out=a.csv", "--data", "two_moons"]])
def test_a_setting_as_an_option_is_answered_by_every_command(command, form):
    with pytest.raises(SystemExit, match=f"divflow {command} has no option --data. .*dashes: data=two_moons$"):
        main([command, *form])


def test_a_command_alone_is_told_what_it_lacks():
    with pytest.raises(SystemExit, match="Give either ckpt_path"):
        main(["sample"])


def test_a_context_as_a_setting_of_its_own_is_shown_as_it_is_written():
    with pytest.raises(SystemExit, match=r'context.age is no setting; write "context=\{age: 41\}"$'):
        main(["sample", "context.age=41"])


def test_the_options_are_those_of_hydra():
    """A single one may be cut short, or be one with its value."""
    parser = get_args_parser()
    assert set(OPTIONS) == {it for action in parser._actions for it in action.option_strings}
    check_options([*OPTIONS, "--multi", "-cjob", "--config-dir=a", "seed=-1", "10"], "train")
    check_options([], "train")


def test_help_and_mistakes_come_before_what_is_slow_to_import(tmp_path):
    """One after another in one process, and what each may not load is loaded by none before it."""
    may_not = [
        (["--help"], ["hydra", "torch", "lightning", "matplotlib"]),
        *(
            ([name, "--help"], ["torch", "lightning", "matplotlib"])
            for name in ("train", "evaluate", "sample", "compare")
        ),
        *((["train", it], ["lightning"]) for it in ("solver.method=dopri9", "+network.depth=3", "seed=-1")),
        (["evaluate", "ckpt_path=none.ckpt"], ["lightning", "matplotlib"]),
        (["sample", "ckpt_path=none.ckpt"], ["lightning"]),
    ]
    code = f"""
import sys
from divflow.cli import main
for arguments, heavy in {may_not!r}:
    try:
        main(arguments)
    except SystemExit:
        print("ended:", arguments)
    print("loaded:", arguments, [name for name in heavy if name in sys.modules])
"""
    output = printed("-c", code, cwd=tmp_path)
    for arguments, _ in may_not:
        assert f"loaded: {arguments} []\n" in output
    assert output.count("ended:") == len(may_not)


def test_the_configs_are_those_of_the_repository_where_it_is_worked_on():
    assert config_dir() == ROOT / "configs"


def test_warnings_are_reported_as_errors_are():
    """Without the line of a library that they come from; the library's own way comes back."""
    with application._plain_warnings():
        assert warnings.formatwarning(UserWarning("look"), UserWarning, "/a/library.py", 3) == "warning: look\n"
    assert "library.py:3" in warnings.formatwarning(UserWarning("look"), UserWarning, "/a/library.py", 3)

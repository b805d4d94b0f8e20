"""The help of each command: one screen, what matters most, and examples that are right."""

import contextlib
import functools
import io
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from run import ROOT

from divflow.cli import main
from divflow.cli.command_line import for_hydra

CONFIGS = ROOT / "configs"
COMMANDS = ("train", "evaluate", "sample", "compare")


def printed(*arguments):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):  # argparse's
            main([*arguments, "--help"])
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return said.getvalue()


text = functools.cache(printed)


@functools.cache
def composed(command, *settings):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(command, list(settings)), resolve=False)


def examples(command):
    return re.findall(r"^  (divflow .*)$", text(*filter(None, [command])).partition("xamples:\n")[2], re.MULTILINE)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_it_fits_a_screen(command):
    lines = text(*filter(None, [command])).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: divflow {command}".strip())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_three_examples_are_commands(command):
    given = [shlex.split(line)[1:] for line in examples(command)]
    assert len(given) == 3
    assert all(name == command if command else name in COMMANDS for name, *_ in given)


COMPOSED = [(name, number) for name in ("train", "", "evaluate", "sample") for number in range(3)]


@pytest.mark.parametrize(
    ("command", "number"), [COMPOSED[0], *(pytest.param(*it, marks=pytest.mark.slow) for it in COMPOSED[1:])]
)
def test_an_example_composes(command, number):
    _, name, *settings = shlex.split(examples(command)[number])
    assert composed(name, *settings)


@pytest.mark.parametrize("number", range(3))
def test_an_example_of_compare_is_parsed(number, tmp_path, monkeypatch):
    """There are no runs, which is what it says."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is no finished run"):
        main(shlex.split(examples("compare")[number])[1:])


def test_every_group_is_listed():
    for group in CONFIGS.iterdir():
        if group.is_dir() and group.name != "hydra":
            assert f"{group.name}:" in text("train")


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
def test_what_it_lists_are_settings_with_their_values(command):
    listed = text(command).partition("Settings:")[2].partition("Examples:")[0]
    settings = re.findall(r"([a-z_.]+)=([^ ,]+)", listed)
    assert len(settings) >= 6
    for setting, value in settings:
        node = composed(command)
        for part in setting.split("."):
            assert part in node, setting
            node = node[part]
        if re.fullmatch(r"[0-9.]+|[a-z_.]+", value) and setting != "overwrite":
            assert str(node).replace("None", "null") == value, setting


@pytest.mark.slow
def test_choices_of_ones_own_stand_first(tmp_path, monkeypatch):
    (tmp_path / "mine" / "network").mkdir(parents=True)
    (tmp_path / "mine" / "network" / "zebra.yaml").write_text("_target_: my_module.Zebra\n")
    monkeypatch.chdir(tmp_path)
    found = re.search(r"^  network: (.*), \+\d+ ", printed("train", "--config-dir", "mine"), re.MULTILINE)
    assert found[1].startswith("zebra, concat_squash, ")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["a=1", "--config-dir", "x", "b=2"], ["--config-dir", "x", "a=1", "b=2"]),
        (["a=1", "-m", "b=2", "-c", "job"], ["-m", "-c", "job", "a=1", "b=2"]),
        (["--info", "a=1"], ["--info", "a=1"]),
        (["a=1", "--info", "defaults", "b=2"], ["--info", "defaults", "a=1", "b=2"]),
        (["~a", "--config-path=/x", "+b=-1"], ["--config-path=/x", "~a", "+b=-1"]),
    ],
)
def test_options_stand_before_settings(given, taken):
    assert for_hydra(given) == taken

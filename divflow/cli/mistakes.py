"""What Hydra refuses of a command line, in one line with the remedy, and what it would take in silence."""

import itertools
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from divflow.cli.command_line import OPTIONS
from divflow.saved.named import ConfigError, meant

__all__ = ["check_no_choice_is_hidden", "check_options", "in_a_line", "last_own_line"]

_LONG = [it for it in OPTIONS if it.startswith("--")]
_SHORT = tuple(it for it in OPTIONS if not it.startswith("--"))
# The groups that a task brings with it.
_OF_TASK = dict.fromkeys(("sde", "objective", "sampler"), "score") | dict.fromkeys(
    ("path", "coupling"), "flow_matching"
)


def check_options(arguments: Sequence[str], command: str) -> None:
    """Refuse settings that are written as options, `--num_samples 10`.

    Args:
        arguments: command line, without the command.
        command: such as `sample`.

    Raises:
        ConfigError: with the setting as it is written here.
    """
    for argument, following in itertools.pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        # An option may be cut short, and the value of a short one may follow without a space.
        if not argument.startswith("-") or any(it.startswith(option) for it in OPTIONS) or _is_short(option):
            continue
        if not equals and following and "=" not in following and not following.startswith("-"):
            value = following
        written = f"{option.lstrip('-').replace('-', '_')}={value or 'VALUE'}"
        raise ConfigError(
            f"divflow {command} has no option {option}{meant(option, _LONG, 0.85)}. Settings are written without dashes: {written}"
        )


def _is_short(option: str) -> bool:
    return not option.startswith("--") and option.startswith(_SHORT)


def in_a_line(error: Exception, command: str, groups: Iterable[str]) -> str:
    """The message of an error of composing a config.

    Args:
        error: as Hydra raises it.
        command: such as `train`.
        groups: the names of all config groups.
    """
    if isinstance(error, MissingConfigException) and error.options and "/" in (error.missing_cfg_file or ""):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options)
        return (
            f"there is no {group}={choice}{meant(choice, options)}; choose one of {', '.join(options)}, or name the folder that has it by "
            "--config-dir=FOLDER"
        )
    if found := re.match(r"Could not override '(\w+)'\. No match in the defaults list", str(error)):
        task = _OF_TASK.get(found[1])
        where = f"; it is a group of task={task}" if command == "train" and task else ""
        return f"divflow {command} has no group {found[1]!r} here{where}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error, groups)
    if found := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", str(error)):
        return _several_values(found[1], found[2], groups)
    if isinstance(error, OSError) and not str(error.filename).endswith(
        ".yaml"
    ):  # which Hydra makes before the command runs
        return f"{error.filename} can't be made ({error.strerror}). Choose another folder by output_dir=..."
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(error).startswith("Could not override"):
        if (name := str(cause.full_key)).startswith("context."):
            value = re.search(rf"\+{re.escape(name)}=(.*)", str(error))
            return f'{name} is no setting; write "context={{{name[8:]}: {value[1] if value else "VALUE"}}}"'
        return _no_such_setting(cause, groups)
    return " ".join(f"{error} {cause if isinstance(cause, OmegaConfBaseException) else ''}".split())


def check_no_choice_is_hidden(sources: Iterable[Any], folder: Path) -> None:
    """Refuse a choice of one's own that has the name of one of divflow's, which Hydra would take instead.

    Args:
        sources: where configs are searched, in this order (`hydra.runtime.config_sources`).
        folder: the config tree of divflow.

    Raises:
        ConfigError: naming both files.
    """
    places = [Path(urlparse(it.path).path if "://" in it.path else it.path) for it in sources if it.schema == "file"]
    if folder not in places:
        return
    for place in places[places.index(folder) + 1 :]:
        for file in sorted(place.glob("*/**/*.yaml")):
            if (folder / (name := file.relative_to(place))).is_file():
                raise ConfigError(
                    f"{file} has the name of a choice of divflow's, which would be taken instead of it ({name.with_suffix('')}); rename it"
                )


def last_own_line(error: BaseException) -> str | None:
    """The last line of a user's own file that an error passed through; None if there is none.

    Args:
        error: as it was caught.

    Returns:
        Such as `my_module.py, line 12: return self.net(x)`.
    """
    others = [Path(sysconfig.get_path("stdlib")).resolve(), Path(__file__).resolve().parents[1]]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        installed = {"site-packages", "dist-packages"} & set(file.parts) or any(map(file.is_relative_to, others))
        if file.is_file() and not installed:
            return f"{file.name}, line {frame.lineno}: {frame.line}"
    return None


def _unreadable(error: OverrideParseException, groups: Iterable[str]) -> str:
    given = error.override
    if given in groups:
        return f"{given!r} is no setting; write {given}=VALUE, without a space"
    if "=" not in given:
        setting = "ckpt_path" if given.endswith(".ckpt") else "data.path" if "." in given else "SETTING"
        return f"{given!r} is no setting; write {setting}={given if setting != 'SETTING' else 'VALUE'}"
    return (
        f"{given!r} can't be read; in a shell, put a setting with spaces, braces or brackets between quotation marks, such as "
        '"context={age: 41}", and write a list as name=[a,b]'
    )


def _several_values(name: str, values: str, groups: Iterable[str]) -> str:
    many = f"{name}={values} has several values"
    if name in groups or "[" in values:
        return f"{many}. Add -m for a run with each of them, or give one"
    return f"{many}. Write a list as {name}=[{values}], or add -m for a run with each of them"


def _no_such_setting(cause: OmegaConfBaseException, groups: Iterable[str]) -> str:
    name, key, parent = str(cause.full_key), str(cause.key), cause.parent_node
    known = [str(it) for it in parent] if isinstance(parent, DictConfig) else []
    place = name.rpartition(".")[0]
    if not place:
        tree = OmegaConf.to_container(parent, resolve=False) if isinstance(parent, DictConfig) else {}
        deeper = [path for path in _paths(tree) if path.endswith(f".{key}")]
        hint = f" (did you mean {' or '.join(deeper[:3])}?)" if deeper else meant(key, [*known, *groups])
        return f"there is no group or setting {name}{hint}; `divflow COMMAND --help` lists them"
    hint = meant(key, known) or (f"; {place} has {', '.join(known)}" if known else "")
    return f"there is no setting {name}{hint}; another argument of its class is added by +{name}=..."


def _paths(config: Any, place: str = "") -> Iterator[str]:
    """The full names of all settings below a config."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield f"{place}{key}"
            yield from _paths(value, f"{place}{key}.")

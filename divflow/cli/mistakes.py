"""What Hydra refuses of a command line, in one line with the remedy, and what it would take in silence."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra.errors import MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from divflow.saved.named import ConfigError, meant

__all__ = ["check_no_choice_is_hidden", "in_a_line"]

# The groups that a task brings with it.
_OF_TASK = dict.fromkeys(("sde", "objective", "sampler"), "score") | dict.fromkeys(
    ("path", "coupling"), "flow_matching"
)


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
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(error).startswith("Could not override"):
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


def _no_such_setting(cause: OmegaConfBaseException, groups: Iterable[str]) -> str:
    name, key, parent = str(cause.full_key), str(cause.key), cause.parent_node
    known = [str(it) for it in parent] if isinstance(parent, DictConfig) else []
    place = name.rpartition(".")[0]
    if not place:
        return (
            f"there is no group or setting {name}{meant(key, [*known, *groups])}; `divflow COMMAND --help` lists them"
        )
    hint = meant(key, known) or (f"; {place} has {', '.join(known)}" if known else "")
    return f"there is no setting {name}{hint}; another argument of its class is added by +{name}=..."

"""The choices of config groups, as the help of a command lists them (`configs/hydra/help/`)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import DictConfig, OmegaConf

__all__ = ["listed_choices"]

_WIDTH = 100


def listed_choices(groups: Mapping[str, str], others: Sequence[str], *, _root_: DictConfig) -> str:
    """A line for each group with what it is, its own choices first, and after them the other groups, close together.

    Args:
        groups: what they are, by name.
        others: names of further groups, whose choices are listed in whole.
        _root_: the config, which knows where choices are searched.
    """
    sources = _root_.hydra.runtime.config_sources
    folders = [_folder(it.path) for it in sources if it.schema == "file"]
    widest = max(map(len, groups.values()))
    room = _WIDTH - 4 - widest
    lines = [f"  {_fitting(group, _choices(group, folders), room):<{room}}  {what}" for group, what in groups.items()]
    text = "; ".join(f"{group}: {', '.join(_choices(group, folders))}" for group in others)
    lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).replace("$", "$$")


def _folder(path: str) -> Path:
    return Path(urlparse(path).path if "://" in path else path)


def _choices(group: str, folders: Sequence[Path]) -> list[str]:
    """Those of folders of one's own, which are searched last, first."""
    return list(
        dict.fromkeys(it.stem for folder in reversed(folders) for it in sorted((folder / group).glob("*.yaml")))
    )


def _fitting(group: str, choices: Sequence[str], room: int) -> str:
    """As many as there is room for, and the number of the others."""
    for count in range(len(choices), 0, -1):
        more = f", +{len(choices) - count}" if count < len(choices) else ""
        if len(shown := f"{group}: {', '.join(choices[:count])}{more}") <= room:
            return shown
    return f"{group}: {len(choices)} choices"


def _resolve(groups: Any, others: Any, *, _root_: DictConfig) -> str:
    return listed_choices(OmegaConf.to_container(groups), OmegaConf.to_container(others), _root_=_root_)  # type: ignore[arg-type]


OmegaConf.register_new_resolver("divflow.choices", _resolve)

"""Runs of a sweep, `divflow train -m seed=0,1,2`: their names, by the settings that differ between them, and how they are resumed."""

import re
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from divflow.saved.named import ConfigError

__all__ = ["check_resumed_alone", "going_on", "swept"]

_LONGEST = 200
# Characters that a command line and a setting take unquoted.
_OTHERS = re.compile(r"[^A-Za-z0-9._+-]+")


def swept(overrides: Sequence[str], number: int) -> str:
    """Name a run by the settings that have other values in other runs of the sweep, such as `lr-0.003_seed-2`.

    A setting is shortened to the last part of its name if that is unique. Of its value only letters, digits and `._+-` are kept, with
    `x` between the entries of a list, so that the folder can be typed as it is in a shell and in `ckpt_path=...`.

    Args:
        overrides: all settings of the run.
        number: number of the run in its sweep, which distinguishes runs of long names.
    """
    swept = _differing(overrides)
    short = [key.rpartition(".")[2] for key in swept]
    parts = []
    for (key, value), last in zip(swept.items(), short, strict=True):
        shown = (
            _typed((key if short.count(last) > 1 else last).lstrip("+~")),
            _typed(value.strip("[]'\"").replace(",", "x")),
        )
        parts.append("-".join(shown))
    name = "_".join(parts)
    whole = all(_OTHERS.search(value.strip("[]'\"").replace(",", "")) is None for value in swept.values())
    return name if name and whole and len(name) <= _LONGEST else f"{name[:_LONGEST]}_{number}".strip("_")


def check_resumed_alone(ckpt_path: str | None) -> None:
    """Refuse a sweep whose runs would all go on from one checkpoint, and end as copies of one run.

    Args:
        ckpt_path: checkpoint of this run; None if it resumes from none.

    Raises:
        ConfigError: naming the settings that are swept.
    """
    differing = _of_this_job()
    if ckpt_path is not None and differing and "ckpt_path" not in differing:
        raise ConfigError(
            f"ckpt_path={ckpt_path} would make every run of a sweep over {', '.join(differing)} go on from one run, as a copy of it. Go on "
            "with that run alone, without -m, and sweep the others without ckpt_path. To start several runs from its weights, use init_from=..."
        )


def going_on(last: str) -> str:
    """How a stopped run is resumed.

    Args:
        last: its last checkpoint.
    """
    differing = _of_this_job()
    if not differing:
        return f"go on with ckpt_path={last}, added to the same command"
    own = " ".join(f"{key}={value}" for key, value in differing.items())
    return (
        f"this was the run {own} of a sweep. Go on with it alone: the same command without -m, with {own} ckpt_path={last}. Sweep "
        "the values that are left without ckpt_path"
    )


def _of_this_job() -> dict[str, str]:
    """Settings with other values in other runs of the sweep that this run belongs to; empty without a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return {}
    return _differing(HydraConfig.get().overrides.task)


def _differing(overrides: Sequence[str]) -> dict[str, str]:
    parser = OverridesParser.create()
    given = parser.parse_overrides([argument for argument in sys.argv[1:] if "=" in argument and argument[0] != "-"])
    last = {override.get_key_element(): override for override in given}  # which wins
    fixed = {key for key, override in last.items() if not override.is_sweep_override()}
    own = {override.get_key_element(): override for override in parser.parse_overrides(list(overrides))}
    return {key: override.get_value_element_as_str() for key, override in own.items() if key not in fixed}


def _typed(text: str) -> str:
    return _OTHERS.sub("-", text)


OmegaConf.register_new_resolver("divflow.swept", swept)

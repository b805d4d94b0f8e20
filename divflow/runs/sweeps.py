"""Names for the runs of a sweep, `divflow train -m seed=0,1,2`, by the settings that differ between them."""

import re
import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

__all__ = ["swept"]

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
    parser = OverridesParser.create()
    given = parser.parse_overrides([argument for argument in sys.argv[1:] if "=" in argument and argument[0] != "-"])
    fixed = {override.get_key_element() for override in given if not override.is_sweep_override()}
    own = {override.get_key_element(): override for override in parser.parse_overrides(list(overrides))}
    swept = {key: override.get_value_element_as_str() for key, override in own.items() if key not in fixed}
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


def _typed(text: str) -> str:
    return _OTHERS.sub("-", text)


OmegaConf.register_new_resolver("divflow.swept", swept)

"""Names for the runs of a sweep, `python train.py -m seed=0,1,2`: by what differs between them."""

import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

__all__ = ["swept"]

_LONGEST = 200


def swept(overrides: Sequence[str], number: int) -> str:
    """The settings of a run that have other values in the sweep's other runs, such as `seed=1,estimator=exact`.

    Args:
        overrides: all settings of the run.
        number: of the run in its sweep, which tells runs of long names apart.
    """
    parser = OverridesParser.create()
    given = parser.parse_overrides([argument for argument in sys.argv[1:] if "=" in argument and argument[0] != "-"])
    fixed = {override.get_key_element() for override in given if not override.is_sweep_override()}
    own = parser.parse_overrides(list(overrides))
    name = ",".join(str(override.input_line) for override in own if override.get_key_element() not in fixed)
    name = name.replace("/", "_")
    return f"{name[:_LONGEST]}_{number}" if not name or len(name) > _LONGEST else name


OmegaConf.register_new_resolver("divflow.swept", swept)

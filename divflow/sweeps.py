"""Names for the runs of a sweep, `python train.py -m seed=0,1,2`: by what differs between them."""

import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

__all__ = ["swept"]

_LONGEST = 200


def swept(overrides: Sequence[str], number: int) -> str:
    """The settings of a run that were not given as they are, such as `seed=1,estimator=exact`.

    Args:
        overrides: all settings of the run.
        number: of the run in its sweep, which tells runs of long names apart.
    """
    name = ",".join(override for override in overrides if override not in sys.argv).replace("/", "_")
    return f"{name[:_LONGEST]}_{number}" if not name or len(name) > _LONGEST else name


OmegaConf.register_new_resolver("divflow.swept", swept)

"""All rows of a run's file, in its order and undivided."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from divflow.data import table
from divflow.data.angles import Angles
from divflow.data.module import Rows
from divflow.data.places import Places
from divflow.data.rotations import Rotations

__all__ = ["undivided"]

_READ: dict[type, Callable[..., tuple[Rows, Tensor]]] = {
    table.Table: table.all_rows,
    Places: Places.all_rows,
    Angles: Angles.all_rows,
    Rotations: Rotations.all_rows,
}


def undivided(settings: Mapping[str, Any]) -> tuple[Rows, Tensor, str] | None:
    """All rows of a file, their digests, and the name under which a checkpoint keeps those of the training.

    Args:
        settings: plain values: a data module by `_target_`, and its arguments.

    Returns:
        None for data that are not rows of a file.

    Raises:
        DivflowError: as the data module.
    """
    for cls, read in _READ.items():
        if settings.get("_target_") in (f"divflow.data.{cls.__name__}", f"{cls.__module__}.{cls.__qualname__}"):
            rows, digests = read(**{name: value for name, value in settings.items() if name != "_target_"})
            return rows, digests, cls.__qualname__
    return None

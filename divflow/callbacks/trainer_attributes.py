"""Attributes of Lightning's trainer that it does not declare, because other classes of Lightning set them."""

from typing import Protocol, cast

import lightning as L

__all__ = ["declared"]


class _Declared(Protocol):
    callbacks: list[L.Callback]
    datamodule: L.LightningDataModule | None
    fast_dev_run: bool | int
    log_every_n_steps: int


def declared(trainer: L.Trainer) -> _Declared:
    """The trainer with those attributes declared for the type checker."""
    return cast(_Declared, trainer)

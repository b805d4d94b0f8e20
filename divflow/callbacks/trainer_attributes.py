"""What Lightning's trainer has but does not declare, because other classes of Lightning set it."""

from typing import Protocol, cast

import lightning as L

__all__ = ["declared"]


class _Declared(Protocol):
    callbacks: list[L.Callback]
    datamodule: L.LightningDataModule | None
    fast_dev_run: bool | int
    log_every_n_steps: int


def declared(trainer: L.Trainer) -> _Declared:
    """The trainer itself, by its attributes that a type checker can't see."""
    return cast(_Declared, trainer)

"""Your own LightningDataModule: the shapes and the parts of its batches."""

from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from divflow.data.batch import DataError, Keys, Parts, parts_of

__all__ = ["check_loaders", "first_parts", "is_features", "split_parts"]

_STAGES = {"train": "fit", "val": "validate", "test": "test"}


def check_loaders(data: L.LightningDataModule) -> None:
    """Refuse a data module without one of the three loaders that a run needs.

    Raises:
        DataError: naming the missing loaders.
    """
    if not isinstance(data, L.LightningDataModule):
        raise DataError(
            f"data must be a LightningDataModule, but data._target_ made a {type(data).__name__}. Return your loaders from the "
            "train_dataloader, val_dataloader and test_dataloader of one"
        )
    names = [f"{split}_dataloader" for split in _STAGES]
    if missing := [name for name in names if not is_overridden(name, data, L.LightningDataModule)]:
        raise DataError(
            f"{type(data).__name__} has no {', '.join(missing)}, but a run trains, validates and tests. Define {', '.join(names)}"
        )


def first_parts(data: L.LightningDataModule, keys: Keys | None) -> Parts:
    """Parts of the first training batch, from which the shapes are known; the state of random numbers is restored.

    Raises:
        DataError: there is no batch, or `parts_of` refuses it.
    """
    with torch.random.fork_rng(devices=[]):
        return next(_batches(data, "train", keys))


def split_parts(data: L.LightningDataModule, split: str, keys: Keys | None) -> list[Parts]:
    """Parts of all batches of a split, "train", "val" or "test", in the order of its loader.

    Raises:
        DataError: as `first_parts`.
    """
    return list(_batches(data, split, keys))


def _batches(data: L.LightningDataModule, split: str, keys: Keys | None) -> Iterator[Parts]:
    data.prepare_data()
    data.setup(_STAGES[split])
    loader = getattr(data, f"{split}_dataloader")()
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"{split}_dataloader must return one DataLoader, but returned a {type(loader).__name__}. Join its datasets by "
            "torch.utils.data.ConcatDataset"
        )
    empty = True
    for batch in loader:
        empty = False
        yield parts_of(batch, keys)
    if empty:
        raise DataError(f"{split}_dataloader gives no batch. Give it at least one")


def is_features(context: object) -> bool:
    """Whether divflow's networks take a context: floating-point features `(k, features)`."""
    return isinstance(context, Tensor) and context.ndim == 2 and context.is_floating_point()

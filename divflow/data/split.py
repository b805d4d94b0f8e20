"""Rows divided by seed into training, validation and test; a trained density recognizes its rows in changed data."""

import warnings
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from divflow.data.module import DataError, TensorDataModule

__all__ = ["SplitData", "describe_changes", "has_none_of", "row_digests", "split_numbers"]

_SPLIT = ("val_fraction", "test_fraction", "seed")


class SplitData(TensorDataModule):
    """Base of data that are split by seed, such as tables and images.

    A checkpoint keeps a digest of each row and the settings of the split. A resumed run, or a loaded density, takes the split of the
    training where its rows are still there, and warns if rows are new, gone or changed. A seed would divide another number of
    rows anew, and most of the new test would have been trained on. New rows are in no split.

    A subclass calls `_split` once it has its rows, and makes its datasets in `_divide`.
    """

    _names: Sequence[str] = ()

    def _split(self, rows: Tensor, val_fraction: float, test_fraction: float, seed: int) -> None:
        self._digests = row_digests(rows)
        how = zip(_SPLIT, (val_fraction, test_fraction, seed), strict=True)
        self._divided: dict[str, Any] = {"digests": self._digests, **dict(how)}
        self._divide(*split_numbers(len(rows), val_fraction, test_fraction, seed))

    @property
    def num_rows(self) -> int:
        """All rows, those in no split included."""
        return len(self._digests)

    @abstractmethod
    def _divide(self, train: Tensor, val: Tensor, test: Tensor) -> None:
        """Make the datasets of these rows, by their numbers."""

    def state_dict(self) -> dict[str, Any]:
        """State from which a resumed run takes the rows in the same order and recognizes them."""
        return super().state_dict() | {"columns": list(self._names)} | self._divided

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the order of an earlier run, with its split.

        Raises:
            DataError: the columns differ, or too few of its rows are still there.
        """
        super().load_state_dict(state_dict)
        self.check_columns(state_dict)
        self.keep_split(state_dict)

    def check_columns(self, state: Mapping[str, Any]) -> None:
        """Refuse to resume from a state with other columns.

        Raises:
            DataError: naming both.
        """
        before = state.get("columns", list(self._names))
        if before != list(self._names):
            raise DataError(
                f"the run was trained on the columns {', '.join(before)}, but these are {', '.join(self._names)}. Give its columns, by "
                "data.columns=[...], or start another run by init_from=..."
            )

    def keep_split(self, state: Mapping[str, Any], *, other: bool = False) -> None:
        """Take the split of an earlier training for the rows that are still there, and warn of differences.

        Args:
            state: a `state_dict`; one from before rows had digests changes nothing.
            other: whether these may be different data altogether, which are then divided by seed.

        Raises:
            DataError: too few of the earlier rows are still there.
        """
        if "digests" not in state:
            return
        there = _found(state["digests"], self._digests)
        if len(there) and (there < 0).all():
            if not other:
                warnings.warn(describe_changes(state, self._digests), stacklevel=2)
            return
        how, own = ({name: it[name] for name in _SPLIT} for it in (state, self._divided))
        same = len(there) == len(self._digests) and bool((there == torch.arange(len(there))).all())
        if same and how == own:
            return
        then = split_numbers(len(there), **how)
        kept = [there[numbers] for numbers in then]
        kept = [numbers[numbers >= 0] for numbers in kept]
        if len(kept[0]) < 2 or min(map(len, kept)) < 1:
            raise DataError(
                f"{describe_changes(state, self._digests)} Of the {', '.join(str(len(it)) for it in then)} rows of training, validation and "
                f"test, {', '.join(str(len(it)) for it in kept)} are left, which are too few. Restore the rows"
            )
        if not same:
            warnings.warn(describe_changes(state, self._digests), stacklevel=2)
        if how != own:
            asked = [f"{name}={own[name]}" for name in _SPLIT if own[name] != how[name]]
            warnings.warn(
                f"the split is that of the training, by {', '.join(f'{name}={how[name]}' for name in _SPLIT)}, not by "
                f"{', '.join(asked)}, which would test rows that were trained on. Train another density for another split",
                stacklevel=2,
            )
        self._divided = {"digests": state["digests"], **how}
        self._divide(*kept)


def describe_changes(state: Mapping[str, Any], digests: Tensor) -> str:
    """Describe how rows differ from those of a training; empty if they do not, or if those are not known."""
    if "digests" not in state:
        return ""
    there = _found(state["digests"], digests)
    then, now, kept = len(there), len(digests), int((there >= 0).sum())
    if then == now and bool((there == torch.arange(then)).all()):
        return ""
    counts = f"the data have {now} rows, and had {then} when the density was trained: "
    if kept == 0:
        return (
            counts
            + "none of those is among them. The split is drawn anew; if these are the same rows in other units, it tests rows that were trained on."
        )
    order = "" if bool((there[there >= 0].diff() > 0).all()) else ", in another order"
    return (
        f"{counts}{kept} of those are still here{order}, {then - kept} are gone or changed, and {now - kept} are new. The split stays that of the "
        "training; new rows are in none of its parts, but in split=all."
    )


def has_none_of(state: Mapping[str, Any], digests: Tensor) -> bool:
    """Whether none of these rows is among those of a training; False if those are not known."""
    return "digests" in state and bool((_found(state["digests"], digests) < 0).all())


def row_digests(rows: Tensor) -> Tensor:
    """A number for each row, int32, the same for the same values."""
    plain = rows.flatten(1).numpy()
    if plain.dtype.kind == "f":
        plain = plain + 0.0  # which makes -0 and 0 the same
    digests = [zlib.crc32(row) for row in np.ascontiguousarray(plain)]
    return torch.from_numpy(np.array(digests, dtype=np.uint32).view(np.int32))


def _found(then: Tensor, now: Tensor) -> Tensor:
    """For each earlier row its number among the present rows, -1 if it is gone; equal rows are matched in their order."""
    if torch.equal(then, now):
        return torch.arange(len(then), device="cpu")
    found = np.full(len(then), -1)
    _, of_then, of_now = np.intersect1d(_keys(then), _keys(now), assume_unique=True, return_indices=True)
    found[of_then] = of_now
    return torch.from_numpy(found)


def _keys(digests: Tensor) -> np.ndarray:
    """Each digest with its number of earlier occurrences, a pair that no two rows share."""
    plain = digests.numpy().view(np.uint32).astype(np.uint64)
    order = np.argsort(plain, kind="stable")
    ordered = plain[order]
    starts = np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
    places = np.arange(len(ordered))
    before = np.empty(len(ordered), np.uint64)
    before[order] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return (plain << np.uint64(32)) | before


def split_numbers(count: int, val_fraction: float, test_fraction: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the rows of training, validation and test, drawn at random by seed.

    Raises:
        DataError: the fractions are out of range, or a split has no rows.
    """
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise DataError(
            f"val_fraction and test_fraction must be positive and leave rows for training, but are {val_fraction} "
            f"and {test_fraction}"
        )
    order = torch.randperm(count, generator=Generator().manual_seed(seed), device="cpu")
    val, test = int(count * val_fraction), int(count * test_fraction)
    sizes = [count - val - test, val, test]
    if min(sizes[1:]) < 2 or sizes[0] < 2:
        raise DataError(
            f"{count} rows are too few to split into training, validation and test ({sizes[0]}, {val} and {test} "
            "rows, where each needs 2). Give more data, or larger fractions"
        )
    train, val_rows, test_rows = order.split(sizes)
    return train, val_rows, test_rows

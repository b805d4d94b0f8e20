"""Rows of numbers in named columns: split by seed, and standardized by the training rows."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from divflow.data.batch import Parts, parts_of
from divflow.data.dependence import TOLERANCE, dependent_columns
from divflow.data.module import DataError, Rows, check_finite, listed
from divflow.data.order import combined_seed
from divflow.data.split import SplitData
from divflow.flow.transforms import Affine, Bounded, Compose, Rounded, Transform

__all__ = ["Bounds", "Columns", "as_names", "column_rows", "standardization"]

Bounds = Mapping[Any, Any]
"""Of columns, by name or number, which are as configs have them: (low, high), None for no bound on that side."""

# Standardized data beyond this have a log-density beyond float32.
_FARTHEST = 1e18
# Rows in which to count the values that remain distinct beside a huge one.
_LOOKED_AT = 10_000


class Columns(SplitData):
    """Base of tables: rows of numbers in named columns, one row a sample.

    - **Standardization** by the training rows is part of the density: log-densities are per unit of the columns.
    - **Linearly dependent columns** raise a warning, because their density is unbounded.
    - **Context columns** condition the density of the others, p(others | context). They have no density of their own, and are
      standardized, too.
    - **Discrete columns** of whole numbers n get noise u, uniform in [-1/2, 1/2): new noise each epoch in training, fixed by seed in
      validation and test. Samples are rounded. The density p of the noisy numbers bounds the probability of the numbers
      (Theis et al. 2016):

          log P(n) >= E[log p(n + u)]

    Args:
        rows: `(n, columns)`, float64.
        names: names of the columns.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split, and of the noise.
        bounds: bounds of columns, `{name: (low, high)}`, None for no bound on that side. A `Bounded` transform precedes the
            standardization, so that the flow models the whole line and samples stay within the bounds. Those of a discrete column
            are its least and its largest number.
        context: names of the columns that condition the density of the others.
        discrete: names of columns of whole numbers that get noise.
        weight: name of the column with the relative importance of each row, in training, validation and test (`divflow.tasks`). It is
            neither modelled nor a context.

    Attributes:
        columns: names of the modelled columns.
        context_columns: names of the context columns.

    Raises:
        DataError: naming the column or row:

            - a column is constant, rows are not finite, or there are too few;
            - bounds are no bounds, of no column, or rows are at or beyond them;
            - the context names no column, or all;
            - a discrete column has other than whole numbers;
            - weights are negative, or all zero.
    """

    def __init__(
        self,
        rows: Tensor,
        names: Sequence[str],
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        bounds: Bounds | None = None,
        context: str | Sequence[str] | None = None,
        discrete: str | Sequence[str] | None = None,
        weight: str | int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.ndim != 2:
            what = (
                f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            )
            raise DataError(
                f"rows must be a floating-point tensor (n, {len(names)}), but are {what}. Convert them by .double()"
            )
        self._all = column_rows(rows, names, context, discrete, seed, weight)
        given, counts = as_names(context, "context") or [], as_names(weight, "weight") or []
        self.context_columns = [name for name in names if name in given]
        self.columns = [name for name in names if name not in (*given, *counts)]
        self._names = [
            *self.columns,
            *self.context_columns,
            *counts,
        ]  # in this order, rows are recognized wherever the file has them
        rows = rows[:, [list(names).index(name) for name in self._names]]
        self.event_shape, self.context_features = (len(self.columns),), len(self.context_columns)
        self._whole = _entries(discrete, self.columns)
        self._exact = rows[:, : len(self.columns)]
        bounded = _bounded(bounds or {}, self._exact, self.columns, self._whole)
        self._split(rows, val_fraction, test_fraction, seed)
        train = self._all.rows[self.train.numbers]
        self.transform = _fitted(train, self.columns, bounded, self._whole)
        _check_scale(train, self._all.rows, self.transform, self.columns)
        _warn_of_dependence(standardization(train, self.columns)(train)[0], self.columns)
        if self._all.context is not None:
            seen = self._all.context[self.train.numbers]
            self.context_transform = standardization(seen, self.context_columns)
            self.context_range = [end.tolist() for end in seen.aminmax(dim=0)]

    def _divide(self, train: Tensor, val: Tensor, test: Tensor) -> None:
        self.val, self.test = self._all.taken(val), self._all.taken(test)
        self.train = self._all.taken(train)
        if self._whole.any():
            self.train.rows = self._exact[train]
            self.train = _Noisy(self.train, self._whole, self.seed)


def column_rows(
    rows: Tensor,
    names: Sequence[str],
    context: str | Sequence[str] | None,
    discrete: str | Sequence[str] | None,
    seed: int,
    weight: str | int | None = None,
) -> Rows:
    """All rows `(n, columns)`, with context and weights apart and the noise of discrete columns in validation and test.

    Raises:
        DataError: as `Columns`.
    """
    check_finite(rows, names)
    given, counts = as_names(context, "context") or [], as_names(weight, "weight") or []
    _check_known("context is", given, names)
    _check_known("weight is", counts, [name for name in names if name not in given], "that are not the context")
    columns = [name for name in names if name not in (*given, *counts)]
    if not columns:
        raise DataError(
            f"context={given + counts} names all columns, so none is left to model. Leave the modelled columns out of it"
        )
    _check_known("discrete is", as_names(discrete, "discrete") or [], columns, "that are modelled")
    whole = _entries(discrete, columns)
    x, c = (
        rows[:, [names.index(name) for name in part]] for part in (columns, given and [n for n in names if n in given])
    )
    for name, column in zip(
        [n for n, it in zip(columns, whole.tolist(), strict=True) if it], x[:, whole].T, strict=True
    ):
        odd = (column != column.round()).nonzero().flatten()
        if len(odd):
            raise DataError(
                f"discrete column {name} has {column[odd[0]].item():g} in row {odd[0].item()} (counted from 0), and {len(odd)} of "
                f"{len(rows)} rows are not whole numbers. Leave it out of data.discrete, or round it"
            )
    if whole.any():
        noise = torch.rand(x.shape, generator=Generator().manual_seed(seed), dtype=x.dtype, device="cpu") - 0.5
        x = torch.where(whole, x + noise, x)
    return Rows(x, context=c if given else None, weight=_weights(rows, names, counts[0]) if counts else None)


def _weights(rows: Tensor, names: Sequence[str], name: str) -> Tensor:
    found = rows[:, names.index(name)]
    if len(bad := (found < 0).nonzero().flatten()):
        raise DataError(
            f"weight column {name} has {found[bad[0]].item():g} in row {int(bad[0])} (counted from 0), and {len(bad)} of {len(rows)} are "
            "negative. Give weights of at least 0, the relative importance of each row"
        )
    if not found.any():
        raise DataError(
            f"weight column {name} is zero in all {len(rows)} rows, so none counts. Leave it out, by data.weight=null"
        )
    return found


def as_names(names: str | int | Sequence[Any] | None, setting: str) -> list[str] | None:
    """Names as a list of strings; a string is one name.

    Raises:
        DataError: the value is neither a name nor a list of names, or names one twice.
    """
    if names is None:
        return None
    if isinstance(names, str | int):
        names = [names]
    if not isinstance(names, Sequence):
        raise DataError(f"{setting} must be names of columns, such as [a,b], but is {names!r}")
    found = [str(name) for name in names]
    if len(set(found)) < len(found):
        raise DataError(f"{setting} must name each column once, but is {found}")
    return found


class _Noisy(Rows):
    """Rows with some entries of whole numbers, to which every epoch adds its own noise."""

    def __init__(self, rows: Rows, whole: Tensor, seed: int) -> None:
        super().__init__(rows.rows, rows.numbers)
        self._plain, self._whole, self._seed = rows, whole, seed

    def __getitem__(self, index: int) -> Any:
        batch = self.__getitems__([index])
        if isinstance(batch, Tensor):
            return batch[0]
        return Parts(batch.x[0], *(None if it is None else it[0] for it in batch[1:]))

    def __getitems__(self, indices: list[int]) -> Any:
        parts = parts_of(self._plain.__getitems__(indices))
        generator = Generator().manual_seed(combined_seed(self._seed, self.epoch, *indices))
        noise = torch.rand(parts.x.shape, generator=generator, dtype=parts.x.dtype, device="cpu") - 0.5
        x = torch.where(self._whole, parts.x + noise, parts.x)
        return x if parts.context is None and parts.weight is None else parts._replace(x=x)


def _entries(chosen: str | Sequence[str] | None, names: Sequence[str]) -> Tensor:
    """Which of the columns are chosen, `(columns,)`."""
    found = as_names(chosen, "discrete") or []
    return torch.tensor([name in found for name in names], dtype=torch.bool, device="cpu")


def _check_known(what: str, given: Sequence[str], names: Sequence[str], which: str = "") -> None:
    if unknown := [name for name in given if name not in names]:
        raise DataError(
            f"{what} of column {', '.join(unknown)}, but the columns {which and which + ' '}are {', '.join(names)}"
        )


def _fitted(train: Tensor, names: Sequence[str], bounded: Bounded | None, whole: Tensor) -> Transform:
    """Transform from the columns to standardized values on the whole line."""
    y = train if bounded is None else bounded(train)[0]
    parts: list[Transform] = [Rounded(whole.tolist())] if whole.any() else []
    parts += [] if bounded is None else [bounded]
    standardized = standardization(y, names)
    return Compose([*parts, standardized]) if parts else standardized


def standardization(rows: Tensor, names: Sequence[str]) -> Affine:
    """Standardize by mean and standard deviation, whose squares may overflow or underflow float64.

    Raises:
        DataError: a column is constant, or its range is beyond float64.
    """
    largest = rows.abs().amax(dim=0)
    unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
    scaled = rows / unit
    mean, std = scaled.mean(dim=0) * unit, scaled.std(dim=0) * unit
    low, high = rows.aminmax(dim=0)
    if constant := [i for i in range(len(names)) if low[i] == high[i] or std[i] == 0]:
        digits = [names[i] for i in constant if high[i].abs() >= 2**53]
        why = f" Float64 holds 15 digits, and {', '.join(digits)} has more: is it an id?" if digits else ""
        raise DataError(
            f"column {', '.join(names[i] for i in constant)} is constant over the training rows, so it has no density. Leave it out, "
            f"by data.columns=[...].{why}"
        )
    if beyond := [name for name, it in zip(names, std, strict=True) if not it < math.inf]:
        raise DataError(
            f"column {', '.join(beyond)} has a standard deviation beyond {rows.dtype}. Rescale it, or take its logarithm"
        )
    return Affine(mean, std)


def _check_scale(train: Tensor, rows: Tensor, transform: Transform, names: Sequence[str]) -> None:
    """Refuse columns in which one value is so far away that standardization makes the others equal, or has no log-density itself."""
    standardized = transform(rows, values=False)[0]
    for i, name in enumerate(names):
        farthest = int(standardized[:, i].abs().nan_to_num(math.inf).argmax())
        some = train[:_LOOKED_AT]
        there, left = len(some[:, i].unique()), len(transform(some, values=False)[0][:, i].float().unique())
        if standardized[farthest, i].abs() < _FARTHEST and left > there / 2:
            continue
        why = (
            f"float32 distinguishes only {left} of {there} training values"
            if left <= there / 2
            else "it has no log-density in float32"
        )
        raise DataError(
            f"column {name} has {rows[farthest, i].item():g} in row {farthest} (counted from 0), so far from the others that {why}. Drop "
            "such rows, rescale the column, or take its logarithm"
        )


def _bounded(bounds: Bounds, rows: Tensor, names: Sequence[str], whole: Tensor) -> Bounded | None:
    if unknown := [str(name) for name in bounds if str(name) not in names]:
        raise DataError(f"bounds are given for column {', '.join(unknown)}, but the columns are {', '.join(names)}")
    if not bounds:
        return None
    low, high = (torch.full((len(names),), bound, dtype=torch.float64, device="cpu") for bound in (-math.inf, math.inf))
    for name, pair in bounds.items():
        column = names.index(str(name))
        step = 0.5 if whole[column] else 0.0  # the noise of whole numbers
        ends = _ends(name, pair, step)
        low[column], high[column] = ends
        values = rows[:, column]
        beyond = values[(values <= low[column]) | (values >= high[column])]
        if len(beyond):
            raise DataError(
                f"column {name} has {beyond[0].item():g} in {len(beyond)} of {len(rows)} rows {'' if step else 'at or '}beyond its bounds "
                f"{pair}, where its density ends. Give wider bounds, or none"
            )
    return Bounded(low, high)


def _ends(name: object, pair: Any, step: float) -> tuple[float, float]:
    """Low and high, infinite if there is none, widened by a step."""
    try:
        if isinstance(pair, str):  # each letter of which may be a number
            raise TypeError
        low, high = pair
        low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise DataError(f"bounds of column {name} must be [low, high], with null for no bound, but are {pair!r}")
    return low - step, high + step


def _warn_of_dependence(rows: Tensor, names: Sequence[str]) -> None:
    dependent = dependent_columns(rows)
    if dependent:
        functions = [f"{names[i]} (of {listed([names[j] for j in others])})" for i, others in dependent.items()]
        rest = ",".join(name for i, name in enumerate(names) if i not in dependent)
        warnings.warn(
            f"over the {len(rows)} training rows these columns are linear functions of others, to {TOLERANCE:g} of their "
            f"standard deviation: {listed(functions)}. The density is degenerate and its likelihood unbounded. Leave them "
            f"out, by data.columns=[{rest}]",
            stacklevel=4,
        )

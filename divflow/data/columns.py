"""Rows of numbers in named columns: split by seed, and standardized by the training rows."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from divflow.data.dependence import TOLERANCE, dependent_columns
from divflow.data.module import DataError, Rows, TensorDataModule, check_finite, split_rows
from divflow.transforms import Affine, Bounded, Compose

__all__ = ["Bounds", "Columns", "listed"]

Bounds = Mapping[Any, Any]
"""Of columns, by name or number, which are as configs have them: (low, high), None for no bound on that side."""


class Columns(TensorDataModule):
    """Base of tables, one row a sample.

    The standardization's log-determinant is accounted for: log-densities are per unit of the columns. Columns that are
    linear functions of others are warned of, since the rows then lie in a plane, where a density has no bound.

    Args:
        rows: `(n, columns)`, float64.
        names: of the columns.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split.
        bounds: of columns that are known to end there, `{name: (low, high)}`, None for no bound on that side. A `Bounded`
            precedes the standardization: the flow models columns of the whole line, and samples stay within.

    Attributes:
        columns: their names.

    Raises:
        DataError: constant columns, rows that are not finite, or too few of them, bounds of no column, that are none, or that rows
            are at or beyond; each named.
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
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.columns = list(names)
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.ndim != 2:
            what = (
                f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            )
            raise DataError(
                f"rows must be a floating-point tensor (n, {len(self.columns)}), but are {what}; convert them by .double()"
            )
        check_finite(rows, self.columns)
        bounded = _bounded(bounds or {}, rows, self.columns)
        train, val, test = split_rows(rows, val_fraction, test_fraction, seed)
        constant = [name for name, deviation in zip(self.columns, train.std(dim=0), strict=True) if deviation == 0]
        beyond = [
            name for name, deviation in zip(self.columns, train.std(dim=0), strict=True) if not deviation < math.inf
        ]
        if beyond:
            raise DataError(
                f"column {', '.join(beyond)} has a standard deviation beyond {train.dtype}; rescale it, or take its logarithm"
            )
        if constant:
            raise DataError(
                f"column {', '.join(constant)} is constant over the training rows, so it has no density; leave it out, "
                "by columns=[...]"
            )
        _warn_of_dependence(train, self.columns)
        self.event_shape = (rows.shape[1],)
        y = train if bounded is None else bounded(train)[0]
        standardization = Affine(y.mean(dim=0), y.std(dim=0))
        self.transform = standardization if bounded is None else Compose([bounded, standardization])
        self.train, self.val, self.test = Rows(train), Rows(val), Rows(test)


def _bounded(bounds: Bounds, rows: Tensor, names: Sequence[str]) -> Bounded | None:
    if unknown := [str(name) for name in bounds if str(name) not in names]:
        raise DataError(f"bounds are given of column {', '.join(unknown)}, but the columns are {', '.join(names)}")
    if not bounds:
        return None
    low, high = (torch.full((len(names),), bound, dtype=torch.float64, device="cpu") for bound in (-math.inf, math.inf))
    for name, pair in bounds.items():
        column = names.index(str(name))
        low[column], high[column] = _ends(name, pair)
        values = rows[:, column]
        beyond = values[(values <= low[column]) | (values >= high[column])]
        if len(beyond):
            raise DataError(
                f"column {name} has {beyond[0].item():g} in {len(beyond)} of {len(rows)} rows at or beyond its bounds "
                f"{pair}, where its density ends; give wider ones, or none"
            )
    return Bounded(low, high)


def _ends(name: object, pair: Any) -> tuple[float, float]:
    """Low and high, infinite where there is none."""
    try:
        low, high = pair
        low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise DataError(f"bounds of column {name} must be [low, high], of which null is none, but are {pair!r}")
    return low, high


def _warn_of_dependence(rows: Tensor, names: Sequence[str]) -> None:
    dependent = dependent_columns(rows)
    if dependent:
        functions = [f"{names[i]} (of {listed([names[j] for j in others])})" for i, others in dependent.items()]
        rest = ",".join(name for i, name in enumerate(names) if i not in dependent)
        warnings.warn(
            f"over the {len(rows)} training rows these columns are linear functions of others, to {TOLERANCE:g} of their "
            f"standard deviation: {listed(functions)}. The density is degenerate and its likelihood unbounded; leave them "
            f"out, by columns=[{rest}]",
            stacklevel=4,
        )


def listed(names: Sequence[str]) -> str:
    """The first ten of these, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

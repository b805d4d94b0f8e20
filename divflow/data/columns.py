"""Rows of numbers in named columns: split by seed, and standardized by the training rows."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from divflow.data.dependence import TOLERANCE, dependent_columns
from divflow.data.module import DataError, Rows, TensorDataModule, check_finite, split_rows
from divflow.transforms import Affine

__all__ = ["Columns", "listed"]


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

    Attributes:
        columns: their names.

    Raises:
        DataError: constant columns, rows that are not finite, or too few of them; each named.
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
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.columns = list(names)
        check_finite(rows, self.columns)
        train, val, test = split_rows(rows, val_fraction, test_fraction, seed)
        constant = [name for name, deviation in zip(self.columns, train.std(dim=0), strict=True) if deviation == 0]
        if constant:
            raise DataError(
                f"column {', '.join(constant)} is constant over the training rows, so it has no density; leave it out, "
                "by columns=[...]"
            )
        _warn_of_dependence(train, self.columns)
        self.event_shape = (rows.shape[1],)
        self.transform = Affine(train.mean(dim=0), train.std(dim=0))
        self.train, self.val, self.test = Rows(train), Rows(val), Rows(test)


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

"""Warnings about a table: columns and rows that are probably no data, or have no density, but are used as they are."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from divflow.data.module import listed

__all__ = ["warn_of_repeated", "warn_of_suspicious"]

# float64 does not hold all whole numbers from the first on; beyond the second they are no ids.
_DIGITS = 2.0**53, 1e30
# Names of the index that pandas writes by `to_csv`, as it is in the file and as it is read again.
_UNNAMED = ("", "Unnamed: 0")
# Share of the rows that may repeat others by chance, for example after rounding.
_FEW = 0.01


def warn_of_suspicious(
    rows: Tensor, digests: Tensor, names: Sequence[str], modelled: Sequence[str], discrete: Sequence[str], file: str
) -> None:
    """Warn of columns that are modelled as continuous and probably are not, and of repeated rows.

    Args:
        rows: rows of the file, in its order, `(n, columns)`.
        digests: digests of the rows, by `row_digests`.
        names: names of the columns.
        modelled: names of the modelled columns; the others are context.
        discrete: names of the columns that get noise.
        file: name of the file.
    """
    continuous = [(name, rows[:, names.index(name)]) for name in modelled if name not in discrete]
    whole = {name: column for name, column in continuous if bool((column == column.round()).all())}
    index = [name for name, column in whole.items() if _counts(column, named=name not in _UNNAMED)]
    ids = [name for name, column in whole.items() if _DIGITS[0] <= column.abs().max() < _DIGITS[1]]
    tied = [
        name for name, column in whole.items() if name not in (*index, *ids) and len(column.unique()) <= len(column) / 2
    ]
    others = ",".join(name for name in modelled if name not in (*index, *ids)) or "..."
    leave = f"Leave it out, by data.columns=[{others}]"
    if index:
        _warn(
            f"column {_shown(index)} of {file} counts its rows, as the index that pandas writes does, but is modelled like the others. {leave}"
        )
    if ids:
        column = whole[ids[0]]
        _warn(
            f"column {_shown(ids)} of {file} has whole numbers of more than the 15 digits that float64 holds ({len(column.unique())} different "
            f"values are left in {len(column)} rows), as ids have. {leave}"
        )
    if tied:
        _warn(
            f"column {_shown(tied)} of {file} repeats whole numbers in many rows, so its density as a continuous column is unbounded: the "
            "likelihood grows for as long as training goes on. Add noise within a step by "
            f"data.discrete=[{','.join(tied)}], or leave them out, by data.columns=[...]"
        )
    if any(name not in whole for name in modelled):
        warn_of_repeated(digests, file, stacklevel=4)


def warn_of_repeated(digests: Tensor, file: str, stacklevel: int = 3) -> None:
    """Warn of rows that repeat others, if they are more than chance makes.

    Args:
        digests: digests of the rows, by `row_digests`.
        file: name of the file.
        stacklevel: of the warning.
    """
    repeated = len(digests) - len(digests.unique())
    if repeated > _FEW * len(digests):
        warnings.warn(
            f"{repeated} of the {len(digests)} rows of {file} repeat another one, so the test contains rows that were trained on, and its "
            "likelihood has no bound: it grows for as long as peaks there get narrower. Drop them, unless the data have only few values",
            stacklevel=stacklevel,
        )


def _counts(column: Tensor, named: bool) -> bool:
    """Whether it numbers the rows, in any order; one without a name also if rows are left out."""
    steps = column.sort().values.diff()
    return len(column) > 2 and bool((steps == 1).all() if named else (steps > 0).all())


def _shown(names: Sequence[str]) -> str:
    return listed([name or "'' (without a name)" for name in names])


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)

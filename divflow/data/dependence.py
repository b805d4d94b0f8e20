"""Columns that are linear functions of others: their density is degenerate."""

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "dependent_columns"]

TOLERANCE = 1e-6
"""How much of its standard deviation a linear function of the others may leave of a column that they determine."""


def dependent_columns(rows: Tensor, tolerance: float = TOLERANCE) -> dict[int, list[int]]:
    """Find columns that are linear functions (plus a constant) of columns before them.

    Columns are taken one by one, in their order, and projected on those already found independent. The factor R of
    the standardized rows' QR decomposition replaces the rows, so that the cost hardly grows with their number.

    Args:
        rows: `(n, D)`, float64, without constant columns.
        tolerance: largest standard deviation of the residual, where that of each column is 1.

    Returns:
        The number of each dependent column, with the numbers of the independent columns of which it is a linear function.
    """
    centred = rows - rows.mean(dim=0)
    factor = torch.linalg.qr(centred / centred.norm(dim=0), mode="r").R
    directions = torch.empty_like(factor)
    independent: list[int] = []
    dependent: dict[int, list[int]] = {}
    for i, column in enumerate(factor.T):
        basis = directions[:, : len(independent)]
        rest = column - basis @ (basis.T @ column)
        rest = rest - basis @ (basis.T @ rest)  # again, because the residual may be small
        if rest.norm() > tolerance:
            directions[:, len(independent)] = rest / rest.norm()
            independent.append(i)
        else:
            weights = torch.linalg.lstsq(factor[:, independent], column[:, None]).solution.flatten()
            dependent[i] = [independent[j] for j in (weights.abs() > tolerance).nonzero().flatten().tolist()]
    return dependent

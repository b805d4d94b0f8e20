"""The five tables on which the literature compares density estimators, from prepared files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from divflow.data.module import DataError, Rows, TensorDataModule, check_finite

__all__ = ["Literature"]


class _Layout(NamedTuple):
    """Columns, and rows of each split."""

    columns: int
    train: int
    val: int
    test: int


_LAYOUTS = {
    "power": _Layout(6, 1_659_917, 184_435, 204_928),
    "gas": _Layout(8, 852_174, 94_685, 105_206),
    "hepmass": _Layout(21, 315_123, 35_013, 174_987),
    "miniboone": _Layout(43, 29_556, 3_284, 3_648),
    "bsds300": _Layout(63, 1_000_000, 50_000, 250_000),
}


class Literature(TensorDataModule):
    """POWER, GAS, HEPMASS, MINIBOONE or BSDS300, as prepared by Papamakarios et al. 2017 (arXiv:1705.07057).

    Their code cleans, standardizes and splits the raw files. Save its result as three arrays in one folder,

        {train,val,test}.npy      of floats, (rows, columns)

    for example by `np.save("power/train.npy", POWER().trn.x)`, and `.val.x` and `.tst.x`. Rows and columns must be those of
    the paper, or likelihoods could not be compared with published ones. Nothing is standardized again: densities are
    those of the prepared values, in nats, as published.

    | name | columns | training rows | validation | test |
    |---|---|---|---|---|
    | `power` | 6 | 1,659,917 | 184,435 | 204,928 |
    | `gas` | 8 | 852,174 | 94,685 | 105,206 |
    | `hepmass` | 21 | 315,123 | 35,013 | 174,987 |
    | `miniboone` | 43 | 29,556 | 3,284 | 3,648 |
    | `bsds300` | 63 | 1,000,000 | 50,000 | 250,000 |

    Args:
        name: name of the table.
        path: folder of the three files.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        seed: of the order of the training rows; the split is that of the literature.

    Raises:
        DataError: the name is another one, a file does not exist, or has another layout than expected.
    """

    def __init__(
        self, name: str, path: str | Path, batch_size: int = 1000, eval_batch_size: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if name not in _LAYOUTS:
            raise DataError(f"data.name must be one of {', '.join(_LAYOUTS)}, but there is no table {name!r}")
        layout, folder = _LAYOUTS[name], Path(path).expanduser()
        self.event_shape = (layout.columns,)
        self.train, self.val, self.test = (
            Rows(_read(folder / f"{split}.npy", name, (getattr(layout, split), layout.columns)))
            for split in ("train", "val", "test")
        )


def _read(path: Path, name: str, shape: tuple[int, int]) -> Tensor:
    expected = (
        f"data.name={name} expects floats, of shape {shape} in this file, as prepared by Papamakarios et al. 2017"
    )
    if not path.is_file():
        there = sorted(file.name for file in path.parent.iterdir())[:10] if path.parent.is_dir() else []
        raise DataError(
            f"there is no file {path}, and the folder has {', '.join(there) or 'none'}. Put train.npy, val.npy and "
            f"test.npy there: {expected}"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} could not be read as .npy: {error}. {expected}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} holds several arrays, as an .npz file does, but {expected}")
    if array.shape != shape or array.dtype.kind != "f":
        raise DataError(f"{path} has {array.dtype} of shape {array.shape}, but {expected}")
    values = torch.from_numpy(array.astype(np.float64, copy=False))  # of the machine's byte order, which torch needs
    check_finite(values)
    rows = values.float()
    if rows.isinf().any():
        raise DataError(f"{path} has the value {np.abs(array).max():.3g}, which is beyond float32. Rescale that column")
    return rows

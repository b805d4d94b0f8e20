"""Images of discrete values: made continuous in the unit cube, and evaluated as discrete data."""

import torch
from torch import Generator, Tensor

from divflow.data.dequantization import Dequantization, UniformDequantization, dequantize
from divflow.data.module import DataError, Rows
from divflow.data.order import combined_seed
from divflow.data.split import SplitData
from divflow.errors import check_count
from divflow.flow.transforms import Affine, Compose, Logit, Transform

__all__ = ["DiscreteImages"]


class DiscreteImages(SplitData):
    """Images of values 0, ..., levels - 1, split by seed; base of the images that divflow reads, and usable by itself.

    A flow models continuous data, so noise u is added to each value n: new noise each epoch in training, fixed by seed in evaluation.
    Batches are

        y = (n + u) / levels

    in the unit cube. `transform` is a logit and a standardization, with their log-determinants. Bits per dimension are those of
    the discrete data, for which the density of y gives an upper bound (see `Dequantization`).

    Args:
        values: integers `(n, *event)`.
        levels: number of values.
        margin: margin of the logit; None for a standardization without logit.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split and of the noise in evaluation.
        dequantization: distribution of the noise; uniform if None.
        num_draws: draws of the noise for each image of the test. The test reports the average of their bounds, its remaining error,
            and the tighter importance-weighted bound of all of them.

    Raises:
        DataError: values are out of range, or the fractions leave a split empty.
        ValueError: num_draws is not a positive whole number, or margin not in (0, 1/2).

    Example:
        >>> data = DiscreteImages(torch.randint(4, (100, 1, 8, 8)), levels=4)
        >>> data.event_shape
        (1, 8, 8)
    """

    levels: int
    images = True

    def __init__(
        self,
        values: Tensor,
        levels: int = 256,
        margin: float | None = 0.05,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        dequantization: Dequantization | None = None,
        num_draws: int = 1,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check_count("num_draws", num_draws)
        if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex() or values.numel() == 0:
            what = (
                f"{values.dtype} of shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else f"a {type(values).__name__}"
            )
            none = "there are no images: " if isinstance(values, Tensor) and values.numel() == 0 else ""
            raise DataError(
                f"{none}values must be integers from 0 to {levels - 1}, a tensor (n, *event), but are {what}"
            )
        if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # for which torch has no aminmax
            values = values.to(torch.int32 if values.dtype == torch.uint16 else torch.int64)
        low, high = (end.item() for end in values.aminmax())  # as numbers, because a uint8 holds no 256
        if low < 0 or high >= levels:
            raise DataError(
                f"values must be integers from 0 to {levels - 1}, but are {values.dtype} from {low} to {high}"
            )
        self.event_shape, self.levels, self.num_draws = tuple(values.shape[1:]), levels, num_draws
        self.dequantization = UniformDequantization() if dequantization is None else dequantization
        self._values = values
        self._split(values, val_fraction, test_fraction, seed)
        self.transform = self._fit(self.train.rows, margin, self._noise)

    def _divide(self, train: Tensor, val: Tensor, test: Tensor) -> None:
        self._noise = Generator().manual_seed(self.seed)
        self.val, self.test = (Rows(self._dequantize(self._values[it], self._noise), it) for it in (val, test))
        self.train = _Dequantized(self._values[train], train, self)

    def _dequantize(self, values: Tensor, generator: Generator) -> Tensor:
        return dequantize(values, self.levels, self.dequantization, generator)

    def _fit(self, values: Tensor, margin: float | None, generator: Generator) -> Transform:
        """Fit logit and standardization; few rows are drawn several times, and only a part of many is in floats at once."""
        logit = Affine() if margin is None else Logit(margin)
        draws = max(1, min(10, 100_000 // len(values)))
        total, squares = torch.zeros(2, *self.event_shape, dtype=torch.float64, device="cpu")
        for _ in range(draws):
            for rows in values.split(2_000):
                y, _ = logit(self._dequantize(rows, generator).double())
                total += y.sum(dim=0)
                squares += y.square().sum(dim=0)
        count = draws * len(values)
        mean = total / count
        std = ((squares / count - mean.square()) * count / (count - 1)).sqrt()
        return Affine(mean, std) if margin is None else Compose([logit, Affine(mean, std)])


class _Dequantized(Rows):
    """Rows of values, to which every epoch adds its own noise."""

    def __init__(self, rows: Tensor, numbers: Tensor, data: DiscreteImages) -> None:
        super().__init__(rows, numbers)
        self._seed, self._levels, self._dequantization = data.seed, data.levels, data.dequantization

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        noise = Generator().manual_seed(combined_seed(self._seed, self.epoch, *indices))
        return dequantize(self.rows[indices], self._levels, self._dequantization, noise)

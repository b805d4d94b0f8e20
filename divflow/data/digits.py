"""Handwritten digits: real images that scikit-learn ships."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from divflow.data.module import DataError, Rows, TensorDataModule, split_rows
from divflow.data.order import combined_seed
from divflow.transforms import Affine, Compose, Logit

__all__ = ["Digits"]

_LEVELS = 17  # grey values 0, ..., 16


class Digits(TensorDataModule):
    """The 1,797 8 x 8 images of scikit-learn's `load_digits`, grey values 0 to 16.

    A flow models continuous data, so a uniform u in [0, 1) is added to each grey value n (fresh every time
    in training, fixed by seed in evaluation): the batches are y = (n + u) / 17 in the unit cube. A logit and a
    standardization follow as `transform`, each with its log-determinant. By Jensen's inequality

        -log2 P(n) / D <= -log2 p(y) / D + log2(17)

    which is what is reported as bits per dimension of the discrete data (Theis et al. 2016, section 3.1).

    Args:
        event_shape: (64,) for vectors or (1, 8, 8) for images.
        margin: of the logit.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        val_fraction: share of the rows held out for validation.
        test_fraction: share of the rows held out for the test.
        seed: of the split and of the noise in evaluation.

    Raises:
        DataError: another event shape, or fractions that leave a split empty.
    """

    levels = _LEVELS
    images = True

    def __init__(
        self,
        event_shape: Sequence[int] = (64,),
        margin: float = 0.05,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.event_shape = tuple(event_shape)
        if self.event_shape not in ((64,), (1, 8, 8)):
            raise DataError(f"digits are events of shape (64,) or (1, 8, 8), not {self.event_shape}")
        from sklearn.datasets import load_digits  # here, since it takes half a second to import

        images = torch.as_tensor(load_digits().data, dtype=torch.float32).view(-1, *self.event_shape)
        train, val, test = split_rows(images, val_fraction, test_fraction, seed)
        noise = Generator().manual_seed(seed)
        self.train = _Dequantized(train, seed)
        self.val, self.test = (Rows(_dequantize(rows, noise)) for rows in (val, test))
        logit = Logit(margin)
        logits, _ = logit(torch.cat([_dequantize(train, noise) for _ in range(10)]))
        self.transform = Compose([logit, Affine(logits.mean(dim=0), logits.std(dim=0))])


class _Dequantized(Rows):
    """Rows of grey values, to which every epoch adds noise of its own."""

    def __init__(self, rows: Tensor, seed: int) -> None:
        super().__init__(rows)
        self._seed = seed

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        noise = Generator().manual_seed(combined_seed(self._seed, self.epoch, *indices))
        return _dequantize(self.rows[indices], noise)


def _dequantize(rows: Tensor, generator: Generator) -> Tensor:
    return (rows + torch.rand(rows.shape, generator=generator)) / _LEVELS

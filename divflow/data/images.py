"""Images of one's own."""

from pathlib import Path

from divflow.data.dequantization import Dequantization
from divflow.data.discrete import DiscreteImages
from divflow.data.image_files import read_images

__all__ = ["Images"]


class Images(DiscreteImages):
    """Images from files, all of one size, bytes 0 to 255; events are `(channels, height, width)`.

    Grey images have one channel, colours three. Bilevel images become grey, and palettes colours, without loss;
    transparency, 16 bits and several frames a file are refused, and so are other colour spaces, unless `mode` converts
    them. All are kept in memory, a byte a value.

    Args:
        path: a folder of image files, with its subfolders; or an `.npy` or `.npz` file of bytes (uint8) of shape
            (n, height, width), (n, height, width, channels) or (n, channels, height, width).
        key: which of an `.npz` file's arrays; its only one if None.
        mode: "L" or "RGB", into which image files are converted; None for as they are.
        margin: this and all others as `DiscreteImages`.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step.
        val_fraction: share of the validation rows.
        test_fraction: share of the test rows.
        seed: of the split and of the noise in evaluation.
        dequantization: the noise.
        num_draws: draws of the noise for each image in the test.

    Raises:
        DataError: no such path, no images, files that can't be read, other sizes, channels or dtypes, several arrays;
            each named.
    """

    def __init__(
        self,
        path: str | Path,
        key: str | None = None,
        mode: str | None = None,
        margin: float | None = 0.05,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        dequantization: Dequantization | None = None,
        num_draws: int = 1,
    ) -> None:
        splits = (batch_size, eval_batch_size, val_fraction, test_fraction, seed)
        super().__init__(read_images(path, key, mode), 256, margin, *splits, dequantization, num_draws)

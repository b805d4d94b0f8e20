"""Images of one's own."""

from pathlib import Path
from typing import Any

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
        settings: of `DiscreteImages`: margin, batch_size, seed and so on.

    Raises:
        DataError: no such path, no images, files that can't be read, other sizes, channels or dtypes, several arrays;
            each named.
    """

    def __init__(self, path: str | Path, key: str | None = None, mode: str | None = None, **settings: Any) -> None:
        super().__init__(read_images(path, key, mode), 256, **settings)

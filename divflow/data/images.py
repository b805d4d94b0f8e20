"""Images of one's own."""

from pathlib import Path
from typing import Any

from divflow.data.discrete import DiscreteImages
from divflow.data.image_files import read_images

__all__ = ["Images"]


class Images(DiscreteImages):
    """Images from files, all of one size, bytes 0 to 255, or values of 16 bits; events are `(channels, height, width)`.

    Grey images have one channel, colours three. Bilevel images become grey, and palettes colours, without loss; images
    are turned as their EXIF orientation says. Grey images of 16 bits have 65,536 levels, and so have arrays of uint16; colours
    of 16 bits, transparency and several frames a file are refused, and so are other colour spaces, unless `mode` converts
    them. All are kept in memory, a byte a value, or four for those of 16 bits.

    Args:
        path: a folder of image files, with its subfolders; or an `.npy` or `.npz` file of uint8 or uint16 of shape
            (n, height, width), (n, height, width, channels) or (n, channels, height, width).
        key: which of an `.npz` file's arrays; its only one if None.
        mode: "L" or "RGB", into which image files are converted; None for as they are.
        settings: of `DiscreteImages`: margin, batch_size, seed and so on.

    Raises:
        DataError: no such path, no images, files that can't be read, other sizes, channels or dtypes, several arrays;
            each named.
    """

    def __init__(self, path: str | Path, key: str | None = None, mode: str | None = None, **settings: Any) -> None:
        values = read_images(path, key, mode)
        super().__init__(values, 2 ** (8 * values.element_size()), **settings)

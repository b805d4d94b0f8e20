"""Your own images, from a folder or an array."""

from pathlib import Path
from typing import Any

from divflow.data.discrete import DiscreteImages
from divflow.data.image_files import read_images

__all__ = ["Images"]


class Images(DiscreteImages):
    """Images from files, all of one size, with 8 or 16 bits a value; events are `(channels, height, width)`.

    - Grey images have one channel, colours three. Bilevel images become grey, and palettes colours, without loss.
    - Images are turned by their EXIF orientation.
    - Grey images of 16 bits, and arrays of uint16, have 65,536 levels.
    - Colours of 16 bits, transparency, several frames a file and other colour spaces are refused; `mode` converts some of them.
    - All images are kept in memory, with one byte a value, or four for 16 bits.

    Args:
        path: folder of image files, with its subfolders; or an `.npy` or `.npz` file of uint8 or uint16 of shape
            (n, height, width), (n, height, width, channels) or (n, channels, height, width).
        key: name of the array in an `.npz` file; its only one if None.
        mode: "L" or "RGB", to which image files are converted; None to keep them as they are.
        settings: arguments of `DiscreteImages`: margin, batch_size, seed and so on.

    Raises:
        DataError: naming the file: there is no such path, it holds no images or several arrays, a file can't be read, or sizes,
            channels or dtypes differ.
    """

    def __init__(self, path: str | Path, key: str | None = None, mode: str | None = None, **settings: Any) -> None:
        values = read_images(path, key, mode)
        super().__init__(values, 2 ** (8 * values.element_size()), **settings)

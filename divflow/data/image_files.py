"""Images from files: a folder of image files, or an array of them."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from divflow.data.module import DataError

__all__ = ["read_images"]

_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# Pillow's modes, with their numbers of channels; bilevel images and palettes become these without loss.
_CHANNELS = {"L": 1, "RGB": 3}
_LOSSLESS = {"1": "L", "P": "RGB"}


def read_images(path: str | Path, key: str | None = None, mode: str | None = None) -> Tensor:
    """Read all images under a path, uint8 or uint16 `(n, channels, height, width)`, with one or three channels.

    Args:
        path: folder, whose image files are read in the order of their paths, including those of subfolders; or an `.npy` or
            `.npz` file, see `Images`.
        key: name of the array in an `.npz` file.
        mode: "L" or "RGB", to which image files are converted; None to keep them as they are.

    Raises:
        DataError: naming the file that can't be used.
    """
    path = Path(path).expanduser()
    if mode not in (None, *_CHANNELS):
        raise DataError(f"mode must be L (grey), RGB or null, but is {mode!r}")
    if path.is_dir():
        if key is not None:
            raise DataError(f"key={key} names an array in an .npz file, but {path} is a folder. Leave key out")
        return _from_folder(path, mode)
    if not path.is_file():
        raise DataError(
            f"there is no {path} (looked in {Path.cwd()}). Set data.path to a folder of images, or to an .npy or .npz file"
        )
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"path must be a folder of images, an .npy or an .npz file, but {path.name} is neither")
    if mode is not None:
        raise DataError(
            f"mode={mode} converts image files, but {path.name} holds an array. Convert it before it is saved"
        )
    return _from_array(_load_array(path, key), path.name if key is None else f"{path.name}, array {key},")


def _from_folder(folder: Path, mode: str | None) -> Tensor:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    names = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not names:
        others = f"; of its {len(files)} other files the first is {files[0].name}" if files else ""
        raise DataError(f"{folder} holds no image files ({', '.join(_SUFFIXES)}){others}")
    first = _read_image(names[0], mode)
    images = np.empty((len(names), *first.shape), first.dtype)
    for i, name in enumerate(names):
        image = _read_image(name, mode)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise DataError(
                f"all images must have one size and as many channels and bits, but {name.relative_to(folder)} is "
                f"{_described(image)} and {names[0].relative_to(folder)} {_described(first)}. Scale or crop them to one "
                "size, or convert them to as many channels by data.mode=L or data.mode=RGB"
            )
        images[i] = image
    return torch.from_numpy(images)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_image(path: Path, mode: str | None) -> np.ndarray:
    """Read one image as uint8 or uint16 `(channels, height, width)`, turned upright."""
    try:
        with Image.open(path) as image:
            deep = _is_deep(image)  # which is lost in loading
            image.load()
            _check_image(image, path, mode, deep)
            upright = ImageOps.exif_transpose(image)
            plain = (
                upright.convert("RGBA") if upright.has_transparency_data else upright
            )  # without which a palette warns
            pixels = np.asarray(upright if deep else plain.convert(mode or _LOSSLESS.get(image.mode, image.mode)))
            pixels = pixels.astype(np.uint16) if deep else pixels
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # Pillow's, of broken files
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} could not be read as an image: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _is_deep(image: Image.Image) -> bool:
    """Whether an image file that is not loaded yet has 16 bits a value."""
    ways = [tile[3] for tile in getattr(image, "tile", [])]
    return image.mode.startswith("I;16") or any(";16" in str(way) or _largest(way) > 255 for way in ways)


def _largest(way: Any) -> int:
    """Largest value that a .ppm file declares, as Pillow's decoder receives it."""
    return next((it for it in way if isinstance(it, int)), 0) if isinstance(way, tuple) and way[:1] == ("RGB",) else 0


def _check_image(image: Image.Image, path: Path, mode: str | None, deep: bool) -> None:
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise DataError(f"{path} holds {frames} frames. Save one image a file")
    if deep and image.mode.startswith("I"):
        if mode is not None:
            raise DataError(f"{path} has 16 bits a pixel, which mode={mode} would cut off. Leave data.mode out")
        return
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{path} has pixels of mode {image.mode}, neither 8 nor 16 bits wide. Scale them to 0, ..., 255 and save them "
            "with 8 bits, or with 16"
        )
    if deep:
        raise DataError(
            f"{path} has colours of 16 bits, of which Pillow reads 8. Save them with 8 bits, or as an .npy file of uint16"
        )
    if mode is None and image.has_transparency_data:
        raise DataError(
            f"{path} has an alpha channel or a transparent colour (mode {image.mode}), which has no density. "
            "Drop it by data.mode=RGB or data.mode=L"
        )
    if mode is None and image.mode not in (*_CHANNELS, *_LOSSLESS):
        raise DataError(f"{path} has pixels of mode {image.mode}. Convert them by data.mode=RGB or data.mode=L")


def _described(image: np.ndarray) -> str:
    channels, height, width = image.shape
    deep = " of 16 bits" if image.dtype == np.uint16 else ""
    return f"{width} x {height} (width x height) with {channels} channel{'s' if channels > 1 else ''}{deep}"


def _load_array(path: Path, key: str | None) -> np.ndarray:
    try:
        with path.open("rb") as file:  # which numpy would leave open after an error
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                if key is not None:
                    raise DataError(
                        f"key={key} names an array in an .npz file, but {path.name} holds only one array. Leave key out"
                    )
                return loaded
            name = loaded.files[0] if key is None and len(loaded.files) == 1 else key
            if name not in loaded.files:
                has = ", ".join(f"{name} {loaded[name].shape}" for name in loaded.files) or "no arrays"
                asked = "" if key is None else f"no array {key}, but "
                raise DataError(f"{path.name} holds {asked}{has}. Choose one array by data.key=NAME")
            return loaded[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} could not be read as {path.suffix}: {error}") from error


def _from_array(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind == "u":
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in (np.uint8, np.uint16):
        remedy = (
            "(255 * x).round().astype('uint8') of values in [0, 1]" if array.dtype.kind == "f" else "astype('uint8')"
        )
        raise DataError(
            f"{name} holds {array.dtype}, but bits per dimension need whole numbers: bytes, 0, ..., 255, or uint16. "
            f"Save it as such, by {remedy}"
        )
    if array.size == 0:
        raise DataError(f"{name} holds no images, since its shape is {array.shape}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in _CHANNELS.values() and array.shape[1] not in _CHANNELS.values():
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[3] in _CHANNELS.values() or array.shape[1] not in _CHANNELS.values():
        raise DataError(
            f"{name} has shape {array.shape}, but images are (n, height, width), (n, height, width, channels) or (n, channels, "
            "height, width) with 1 or 3 channels, on one side only. Leave an alpha channel out"
        )
    return torch.from_numpy(np.ascontiguousarray(array))

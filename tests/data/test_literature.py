import numpy as np
import pytest
import torch

from divflow.data import DataError, Literature

SIZES = {"train": 29_556, "val": 3_284, "test": 3_648}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made files of MINIBOONE's layout."""
    folder = tmp_path_factory.mktemp("miniboone")
    for i, (split, size) in enumerate(SIZES.items()):
        np.save(folder / f"{split}.npy", np.random.default_rng(i).normal(size=(size, 43)))
    return folder


def test_the_split_and_the_values_are_those_of_the_files(folder):
    data = Literature("miniboone", folder)
    assert data.event_shape == (43,)
    for split in SIZES:
        rows = getattr(data, split).rows
        np.testing.assert_array_equal(rows.numpy(), np.load(folder / f"{split}.npy").astype(np.float32))
    y, log_det = data.transform(data.test.rows)
    assert torch.equal(y, data.test.rows)
    assert not log_det.any()
    assert next(iter(data.train_dataloader())).shape == (1000, 43)


def test_the_sizes_are_shares_of_a_tenth():
    """The code of Papamakarios et al. takes a tenth for the test, and a tenth of the rest for validation."""
    from divflow.data.literature import _LAYOUTS

    for name in ("power", "gas", "miniboone"):
        layout = _LAYOUTS[name]
        total = layout.train + layout.val + layout.test
        assert layout.test == total // 10
        assert layout.val == (total - layout.test) // 10


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((29_556, 50)), r"float64 of shape \(29556, 50\), but .* expects floats, .* \(29556, 43\)"),
        (np.zeros((100, 43)), r"of shape \(100, 43\), but .*\(29556, 43\) in this file, as prepared by Papamakarios"),
        (np.zeros((29_556, 43), np.int64), "int64 of shape"),
        (np.full((29_556, 43), np.nan), "29556 of 29556 rows are not finite"),
        (np.full((29_556, 43), 1e300), r"has the value 1e\+300, which is beyond float32"),
        (np.array([{}], dtype=object), r"could not be read as \.npy"),
    ],
)
def test_another_layout_is_refused(tmp_path, array, message):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        Literature("miniboone", tmp_path)


@pytest.mark.parametrize("dtype", [">f8", "<f4", np.longdouble])
def test_floats_of_any_width_and_byte_order_are_taken(tmp_path, dtype):
    for split, rows in {"train": 29_556, "val": 3_284, "test": 3_648}.items():
        np.save(tmp_path / f"{split}.npy", np.full((rows, 43), 1.5, dtype))
    assert (Literature("miniboone", tmp_path).test.rows == 1.5).all()


def test_several_arrays_are_refused(tmp_path):
    with open(tmp_path / "train.npy", "wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(DataError, match=r"holds several arrays.*expects floats"):
        Literature("miniboone", tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.name must be one of power, gas, .* no table 'mnist'"):
        Literature("mnist", tmp_path)
    (tmp_path / "data.npy").touch()
    with pytest.raises(DataError, match=r"train\.npy, and the folder has data\.npy\. Put train\.npy, val\.npy"):
        Literature("power", tmp_path)
    with pytest.raises(DataError, match="the folder has none"):
        Literature("power", tmp_path / "elsewhere")

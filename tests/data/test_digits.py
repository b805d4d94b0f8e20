import pytest
import torch
from sklearn.datasets import load_digits

from divflow.data import DataError, Digits
from divflow.data.discrete import DiscreteImages


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8)])
def test_all_images_are_there_once(shape):
    data = Digits(shape)
    grey = [
        (rows.rows * 17).floor() if name != "train" else rows.rows
        for name, rows in vars(data).items()
        if name in ("train", "val", "test")
    ]
    everything = torch.cat(grey).reshape(-1, 64)
    original = torch.as_tensor(load_digits().data, dtype=torch.float32)
    assert everything.shape == original.shape
    for rows in (everything, original):
        rows[:] = rows[torch.as_tensor(sorted(range(len(rows)), key=lambda i: rows[i].tolist()))]
    assert torch.equal(everything, original)
    assert data.event_shape == shape
    assert next(iter(data.train_dataloader())).shape[1:] == shape


def test_noise_is_fresh_in_training_and_fixed_in_evaluation():
    data, again = Digits(), Digits()
    indices = list(range(10))
    a, same = data.train.__getitems__(indices), data.train.__getitems__(indices)
    assert torch.equal(a, same)
    data.train.epoch = 1
    b = data.train.__getitems__(indices)
    assert not torch.equal(a, b)
    assert torch.equal((a * 17).floor(), (b * 17).floor())
    assert torch.equal(data.test.rows, again.test.rows)
    assert torch.equal(next(iter(data.test_dataloader())), next(iter(data.test_dataloader())))
    assert not torch.equal(data.test.rows, Digits(seed=1).test.rows)
    assert data.val.rows.min() >= 0
    assert data.val.rows.max() < 1


def test_transform_standardizes_the_logits():
    data = Digits()
    y, log_det = data.transform(data.train.__getitems__(list(range(len(data.train)))))
    assert y.mean(dim=0).abs().max() < 0.15
    torch.testing.assert_close(y.std(dim=0), torch.ones(64), rtol=0, atol=0.15)
    assert log_det.shape == (len(data.train),)


def test_errors():
    with pytest.raises(DataError, match=r"\(8, 8\)"):
        Digits((8, 8))
    with pytest.raises(DataError, match="fraction"):
        Digits(val_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (torch.rand(20, 4), r"torch\.float32 of shape \(20, 4\)"),
        (torch.ones(20, 4, dtype=torch.complex64), r"torch\.complex64"),
        (torch.zeros(0, 4, dtype=torch.uint8), r"torch\.uint8 of shape \(0, 4\)"),
        (torch.full((20, 4), 17), r"from 17 to 17"),
        (torch.full((20, 4), -1), r"from -1 to -1"),
    ],
)
def test_values_that_are_no_levels(values, what):
    with pytest.raises(DataError, match=f"integers from 0 to 16.*{what}"):
        DiscreteImages(values, 17)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_all_integers_are_the_same_values(dtype):
    values = torch.arange(80).view(20, 4) % 17
    rows = [DiscreteImages(v, 17, val_fraction=0.2, test_fraction=0.2).test.rows for v in (values, values.to(dtype))]
    assert torch.equal(*rows)

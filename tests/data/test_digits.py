import pytest
import torch
from sklearn.datasets import load_digits

from divflow.data import DataError, Digits


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

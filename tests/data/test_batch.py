"""What a batch may be: nothing in it is left out unless keys leave it out."""

from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from divflow.data.batch import DataError, check_keys, parts_of
from divflow.errors import FieldError

X, C, W = torch.randn(4, 2), torch.arange(4), torch.tensor([1.0, 0.0, 2.0, 0.5])
Named = namedtuple("Named", "image label w")
ByName = namedtuple("ByName", "x weight")


@pytest.mark.parametrize(
    ("batch", "keys", "expected"),
    [
        (X, None, (X, None, None)),
        ((X,), None, (X, None, None)),
        ([X], None, (X, None, None)),
        (next(iter(DataLoader(TensorDataset(X), batch_size=4))), None, (X, None, None)),
        (next(iter(DataLoader(TensorDataset(X, C), batch_size=4))), None, (X, C, None)),
        ((X, {"label": C}), None, (X, {"label": C}, None)),
        ({"x": X, "weight": W}, None, (X, None, W)),
        (ByName(X, W), None, (X, None, W)),
        ((X, C, W), {"x": 0, "context": 1, "weight": 2}, (X, C, W)),
        ([X, C, W], {"x": 0, "weight": 2}, (X, None, W)),
        ({"image": X, "label": C, "name": ["a"] * 4}, {"x": "image", "context": "label"}, (X, C, None)),
        ({"image": X, "label": C, "w": W}, {"x": "image", "context": ["label", "w"]}, (X, {"label": C, "w": W}, None)),
        (Named(X, C, W), {"x": "image", "weight": "w"}, (X, None, W)),
        (Named(X, C, W), {"x": 0, "weight": 2}, (X, None, W)),
        (default_collate([{"x": x, "weight": 1} for x in X]), None, (X, None, torch.ones(4, dtype=torch.int64))),
    ],
)
def test_parts_by_place_name_and_key(batch, keys, expected):
    for found, part in zip(parts_of(batch, keys), expected, strict=True):
        torch.testing.assert_close(found, part, rtol=0, atol=0) if part is not None else None
        assert (found is None) == (part is None)
    parts = parts_of(batch, keys)
    assert parts_of(parts, {"x": "what is read already"}) is parts


@pytest.mark.parametrize(
    ("batch", "keys", "message"),
    [
        ((X, C, W), None, r"tuple of 3.*keys=\{'x': 0, 'context': 1, 'weight': 2\}.*data\.keys=\{x: 0, weight: 2\}"),
        ((), None, "tuple of 0"),
        ({"image": X, "label": C}, None, r"the keys 'image', 'label'.*keys=\{'x': 'image'\}"),
        ({"x": X, "label": C}, None, r"the keys 'x', 'label'"),  # a label is not left out
        (Named(X, C, W), None, "tuple of 3|Named of 3"),
        ({"image": X}, {"x": "imgae"}, "keys name 'imgae' as x, but a batch has the keys 'image'"),
        ((X, C), {"x": 0, "weight": 2}, "keys name 2 as weight, but a batch has the keys 0, 1"),
        (X, {"x": "image"}, "no keys, being a Tensor"),
        ({"x": X}, {"context": "x"}, "keys must name x"),
        ({"x": X}, {"x": "x", "label": "x"}, "keys must name x"),
        ("rows", None, "is a str"),
        ({"x": [1.0]}, None, "x of a batch must be a tensor.*is a list"),
        ({"x": X, "weight": W[:3]}, None, r"real numbers of shape \(4,\).*float32 \(3,\)"),
        ({"x": X, "weight": W[:, None]}, None, r"float32 \(4, 1\)"),
        ({"x": X, "weight": W > 0}, None, r"torch\.bool"),
        ({"x": X, "weight": -W}, None, "row 0 of 4, counted from 0, is -1"),
        ({"x": X, "weight": W / W}, None, "row 1 of 4, counted from 0, is nan"),
        ({"x": X, "weight": 0 * W}, None, "4 samples are all zero"),
    ],
)
def test_anything_else_is_refused_with_what_is_there(batch, keys, message):
    with pytest.raises(DataError, match=message):
        parts_of(batch, keys)


def test_a_context_has_a_row_a_sample():
    with pytest.raises(
        FieldError, match=r"the context\['label'\] needs one row per sample, \(4, \.\.\.\), but has shape \(3,\)"
    ):
        parts_of((X, {"label": C[:3]}))


def test_keys_are_looked_at_when_a_task_is_made():
    check_keys(None)
    with pytest.raises(DataError, match="but is 'image'"):
        check_keys("image")


def test_a_batch_of_no_rows_has_no_weights_to_refuse():
    assert len(parts_of({"x": X[:0], "weight": W[:0]}).weight) == 0

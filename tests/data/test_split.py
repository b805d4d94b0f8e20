"""Rows that have changed since a training: which of them are found again, and how its split is kept."""

import re

import numpy as np
import pytest
import torch

from divflow.data import DataError, DiscreteImages
from divflow.data.columns import Columns
from divflow.data.split import describe_changes, row_digests

ROWS = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SPLITS = ("train", "val", "test")


def table(rows, **settings):
    return Columns(rows, ["a", "b"], **settings)


def rows_of(data):
    return {split: {tuple(row) for row in getattr(data, split).rows.tolist()} for split in SPLITS}


CHANGES = {
    "grown": (
        torch.cat([ROWS, NEW]),
        "160 rows, and had 100 .* 100 of those are still here, 0 are gone or changed, and 60 are new",
    ),
    "in front": (torch.cat([NEW, ROWS]), "160 rows, and had 100"),
    "shrunk": (ROWS[:70], "70 rows, and had 100 .* 70 of those are still here, 30 are gone"),
    "one out of the middle": (torch.cat([ROWS[:10], ROWS[11:]]), "99 rows, and had 100"),
    "one changed": (
        torch.cat([ROWS[:10], NEW[:1], ROWS[11:]]),
        "100 rows, and had 100 .* 99 of those are still here, 1 are gone .* 1 are new",
    ),
    "in another order": (ROWS.flip(0), "100 rows, and had 100 .* in another order"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_split_is_that_of_the_training(change):
    now, message = CHANGES[change]
    trained, data = table(ROWS), table(now)
    with pytest.warns(UserWarning, match=message):
        data.load_state_dict(trained.state_dict())
    there = {tuple(row) for row in now.tolist()}
    assert rows_of(data) == {split: rows & there for split, rows in rows_of(trained).items()}
    for split in SPLITS:  # the numbers are those of the file as it is now
        torch.testing.assert_close(getattr(data, split).rows, now[getattr(data, split).numbers])
    # What is saved from here on is still the split of the first training.
    later = table(torch.cat([now, NEW + 1]))
    with pytest.warns(UserWarning, match="and had 100"):
        later.load_state_dict(data.state_dict())
    assert rows_of(later) == rows_of(data)


def test_the_same_rows_are_nothing_to_speak_of():
    """A zero's sign is none, either."""
    zeros = torch.cat([ROWS, torch.zeros(3, 2)])
    trained, data = table(zeros), table(torch.cat([ROWS, -torch.zeros(3, 2)]))
    data.load_state_dict(trained.state_dict())
    assert rows_of(data) == rows_of(trained)
    state = {"order_seed": 3}  # of before rows had digests
    data.load_state_dict(state)
    assert describe_changes(state, row_digests(ROWS)) == ""


def test_repeated_rows_are_told_apart_by_their_order():
    rows = ROWS.repeat(3, 1)
    trained, data = table(rows), table(torch.cat([rows, NEW]))
    with pytest.warns(UserWarning, match="300 of those are still here, 0 are gone or changed, and 60 are new"):
        data.load_state_dict(trained.state_dict())
    assert torch.equal(data.test.numbers, trained.test.numbers)


def test_another_seed_does_not_test_what_was_trained_on():
    trained, data = table(ROWS), table(ROWS, seed=1)
    with pytest.warns(UserWarning, match=r"by val_fraction=0\.1, test_fraction=0\.1, seed=0, not by seed=1"):
        data.keep_split(trained.state_dict())
    assert rows_of(data) == rows_of(trained)


def test_other_rows_altogether():
    trained, data = table(ROWS), table(NEW)
    before = rows_of(data)
    data.keep_split(trained.state_dict(), other=True)
    with pytest.warns(UserWarning, match="60 rows, and had 100 .* none of those is among them"):
        data.keep_split(trained.state_dict())
    assert rows_of(data) == before


def test_too_few_rows_are_left():
    trained = table(ROWS)
    kept = torch.cat([trained.train.rows, NEW])
    with pytest.raises(DataError, match=r"Of the 80, 10, 10 rows .* 80, 0, 0 are left"):
        table(kept).keep_split(trained.state_dict())


def test_other_columns_are_refused():
    data = Columns(ROWS, ["a", "c"])
    with pytest.raises(DataError, match=r"trained on the columns a, b, but these are a, c.*data\.columns=.*init_from"):
        data.load_state_dict(table(ROWS).state_dict())


def test_images_keep_their_split_and_their_noise():
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 17, (100, 4)).astype(np.uint8))
    trained, data = DiscreteImages(values, 17), DiscreteImages(torch.cat([values, values[:50].flip(1)]), 17)
    assert not torch.equal(data.test.numbers[:10], trained.test.numbers)
    with pytest.warns(UserWarning, match="150 rows, and had 100"):
        data.load_state_dict(trained.state_dict())
    for split in SPLITS:
        assert torch.equal(getattr(data, split).numbers, getattr(trained, split).numbers)
        every = list(range(len(getattr(data, split))))
        torch.testing.assert_close(
            getattr(data, split).__getitems__(every), getattr(trained, split).__getitems__(every)
        )


def test_digests_are_of_every_digit():
    rows = ROWS.clone()
    rows[7, 1] += 1e-15 * rows[7, 1].abs()
    different = (row_digests(rows) != row_digests(ROWS)).nonzero().flatten().tolist()
    assert different == [7]
    assert re.match("the data have 100 rows", describe_changes({"digests": row_digests(ROWS)}, row_digests(rows)))

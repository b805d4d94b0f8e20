"""Columns that are given, and columns of whole numbers: what batches, transforms and samples are of them."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from divflow.data import Affine, Bounded, Compose, DataError, Rounded
from divflow.data.batch import parts_of
from divflow.data.columns import Columns
from divflow.flow import ContinuousFlow, FlowDensity

GENERATOR = np.random.default_rng(0)
NUMBERS = torch.from_numpy(
    np.stack([GENERATOR.normal(3, 2, 500), GENERATOR.poisson(4, 500), GENERATOR.normal(0, 9, 500)], 1)
)
NAMES = ["a", "visits", "b"]


def test_a_context_is_apart_and_standardized():
    data = Columns(NUMBERS, NAMES, context=["b"], discrete=["visits"])
    assert (data.columns, data.context_columns, data.context_features) == (["a", "visits"], ["b"], 1)
    for split in (data.train, data.val, data.test):
        x, context, _ = parts_of(split.__getitems__(list(range(len(split)))))
        torch.testing.assert_close(context, NUMBERS[split.numbers][:, 2:])
        torch.testing.assert_close(x[:, 0], NUMBERS[split.numbers, 0])
        assert torch.equal(x[:, 1].round(), NUMBERS[split.numbers, 1])
    seen = NUMBERS[data.train.numbers][:, 2:]
    torch.testing.assert_close(data.context_transform(seen)[0].std(dim=0), torch.ones(1, dtype=torch.float64))
    one = data.train[3]
    assert (one[0].shape, one[1].shape) == ((2,), (1,))


def test_noise_is_uniform_new_in_every_epoch_of_training_and_fixed_in_the_test():
    data, again = (Columns(NUMBERS, NAMES, discrete="visits") for _ in range(2))
    every = list(range(len(data.train)))
    first = data.train.__getitems__(every)
    assert torch.equal(first, again.train.__getitems__(every))
    data.train.epoch = 1
    second = data.train.__getitems__(every)
    assert torch.equal(first[:, [0, 2]], second[:, [0, 2]])
    for x in (first, second):
        noise = x[:, 1] - NUMBERS[data.train.numbers, 1]
        assert kstest(noise.numpy() + 0.5, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first[:, 1] - first[:, 1].round(), second[:, 1] - second[:, 1].round())[0, 1]) < 0.2
    assert torch.equal(data.test.rows, again.test.rows)


def test_samples_of_whole_numbers_are_whole_and_their_log_det_is_that_of_the_rest():
    data = Columns(NUMBERS, NAMES, discrete=["visits"], bounds={"visits": [0, None]})
    assert [type(part).__name__ for part in data.transform.parts] == ["Rounded", "Bounded", "Affine"]
    x = data.test.rows
    y, log_det = data.transform(x)
    torch.testing.assert_close(data.transform.unrounded(y), x)
    back = data.transform.inverse(y)
    torch.testing.assert_close(back, torch.stack([x[:, 0], x[:, 1].round(), x[:, 2]], dim=1))
    slopes = torch.autograd.functional.jacobian(lambda x: data.transform(x)[0].sum(dim=0), x)
    torch.testing.assert_close(log_det, slopes.diagonal(dim1=0, dim2=2).log().sum(dim=1))
    assert (data.transform.inverse(torch.full((1, 3), -50.0))[:, 1] == 0).all()  # never below the bound


def test_a_density_of_whole_numbers_sums_to_one_and_is_weighted_as_such():
    """Of the noisy numbers over each step; a target of whole numbers has its own log Z."""
    flow = ContinuousFlow(lambda t, x: -0.3 * x, 1)
    density = FlowDensity(flow, Compose([Rounded([True]), Bounded([-0.5], [None]), Affine([0.4], [1.3])]))
    grid = torch.arange(-0.5, 400, 1 / 16, dtype=torch.float64)[1:, None]
    assert density.log_prob(grid).exp().sum().item() / 16 == pytest.approx(1, abs=0.02)

    def target(x):
        assert torch.equal(x, x.round())
        return torch.where(x[:, 0] == 1, 0.0, -50.0).double()

    found = density.importance_weights(target, 100_000, torch.Generator().manual_seed(0))
    assert found.log_normalizer.item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": "c"}, "context is of column c, but the columns are a, visits, b"),
        ({"context": NAMES}, "names all columns"),
        ({"discrete": "a"}, r"discrete column a has \S+ in row 0 .* 500 of 500 rows"),
        ({"discrete": "b", "context": "b"}, "discrete is of column b, but the columns that are modelled are a, visits"),
        (
            {"discrete": "visits", "bounds": {"visits": [1, 9]}},
            r"column visits has \d+ in \d+ of 500 rows beyond its bounds",
        ),
        ({"bounds": {"a": "19"}}, r"must be \[low, high\].*'19'"),
    ],
)
def test_what_is_no_context_or_not_whole(settings, message):
    with pytest.raises(DataError, match=message):
        Columns(NUMBERS, NAMES, **settings)


def test_a_constant_context_is_refused():
    rows = NUMBERS.clone()
    rows[:, 2] = 1
    with pytest.raises(DataError, match="column b is constant"):
        Columns(rows, NAMES, context="b")

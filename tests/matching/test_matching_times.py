"""Times: their distributions, against closed forms, and strata."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from divflow.matching import LogarithmicTimes, LogitNormalTimes, PowerTimes, UniformTimes

TIMES = {
    "uniform": (UniformTimes, stats.uniform.cdf),
    "logit-normal": (LogitNormalTimes, lambda t: stats.norm.cdf(torch.logit(torch.as_tensor(t)))),
    "logarithmic": (
        lambda **options: LogarithmicTimes(0.05, **options),
        lambda t: 1 - np.log1p((1 - np.asarray(t)) / 0.05) / math.log(21),
    ),
    "power": (lambda **options: PowerTimes(2.0, **options), stats.powerlaw(3).cdf),
}


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("make", "cdf"), TIMES.values(), ids=TIMES)
def test_distribution(make, cdf, stratified):
    x = torch.zeros(5_000, 2, dtype=torch.float64)
    t = make(stratified=stratified).draw(x, torch.Generator().manual_seed(0))
    assert t.shape == (5_000,)
    assert stats.kstest(t.numpy(), cdf).pvalue > 0.01
    # Not in the order of the strata, in which neighbours would have the same times.
    assert abs(torch.corrcoef(torch.stack([t[1:], t[:-1]]))[0, 1]) < 0.05


@pytest.mark.parametrize(("make", "cdf"), TIMES.values(), ids=TIMES)
def test_each_stratum_has_one(make, cdf):
    t = make().draw(torch.zeros(64, 2, dtype=torch.float64))
    assert sorted((cdf(t) * 64 // 1).tolist()) == list(range(64))


def test_mean_and_width_of_the_logit():
    t = LogitNormalTimes(0.7, 0.4).draw(torch.zeros(20_000, 1, dtype=torch.float64))
    assert torch.logit(t).mean() == pytest.approx(0.7, abs=0.01)
    assert torch.logit(t).std() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_empty_batches(dtype):
    assert UniformTimes().draw(torch.zeros(3, 2, dtype=dtype)).dtype == dtype
    assert LogitNormalTimes().draw(torch.zeros(0, 2, dtype=dtype)).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, "std must be a positive, finite number, but is 0.0"),
        ({"mean": "0"}, "mean must be a finite number"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LogitNormalTimes(**settings)


def test_powers():
    t = PowerTimes(4.0).draw(torch.zeros(20_000, 1, dtype=torch.float64))
    assert t.mean() == pytest.approx(5 / 6, abs=0.01)
    u = torch.linspace(0, 1, 5)
    assert torch.equal(PowerTimes(0.0).quantile(u), u)
    for power in (-1, -3.0, "1", torch.nan):
        with pytest.raises(ValueError, match="power must be"):
            PowerTimes(power)


def test_logarithmic_times():
    """Of each factor of distance from the data there are as many, and all times lie in [0, 1]."""
    t = LogarithmicTimes(1e-4).draw(torch.zeros(20_000, 1, dtype=torch.float64))
    shares = [((1 - t > low) & (1 - t < 10 * low)).double().mean() for low in (1e-3, 1e-2, 1e-1)]
    assert max(shares) - min(shares) < 0.02
    ends = LogarithmicTimes().quantile(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]))
    assert 0 <= ends.min() <= ends.max() <= 1
    with pytest.raises(ValueError, match="epsilon must be a positive"):
        LogarithmicTimes(0.0)

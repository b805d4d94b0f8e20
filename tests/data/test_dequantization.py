"""Noise between discrete values: its density, and the values that it leaves recognisable."""

import math

import pytest
import torch
from scipy import stats
from torch import Generator

from divflow.data import Dequantization, DiscreteImages, TruncatedNormalDequantization, UniformDequantization
from divflow.data.dequantization import dequantize, quantize

KINDS = {
    "uniform": (UniformDequantization(), stats.uniform()),
    "sixth": (TruncatedNormalDequantization(), stats.truncnorm(-3, 3, 0.5, 1 / 6)),
    "wide": (TruncatedNormalDequantization(2.0), stats.truncnorm(-0.25, 0.25, 0.5, 2.0)),
    "narrow": (TruncatedNormalDequantization(0.02), stats.truncnorm(-25, 25, 0.5, 0.02)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_density_that_scipy_knows(kind):
    dequantization, truth = KINDS[kind]
    noise = dequantization.draw(torch.zeros(20_000, dtype=torch.uint8), Generator().manual_seed(0))
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.numpy(), truth.cdf).pvalue > 1e-3
    u = torch.rand(50, 2, 3, dtype=torch.float64)
    expected = torch.as_tensor(truth.logpdf(u.numpy())).sum(dim=(1, 2))
    torch.testing.assert_close(dequantization.log_density(u), expected)


class Ends(Dequantization):
    """Noise at the very ends, where rounding could take it to the next value."""

    def draw(self, values, generator=None):
        return torch.rand(values.shape).round()

    def log_density(self, noise):
        return noise.new_zeros(len(noise))


@pytest.mark.parametrize("levels", [2, 3, 17, 100, 255, 256])
def test_values_are_told_apart_after_the_noise(levels):
    values = torch.arange(levels).repeat(100)
    for dequantization in (UniformDequantization(), TruncatedNormalDequantization(), Ends()):
        y = dequantize(values, levels, dequantization)
        assert y.dtype == torch.float32
        assert 0 < y.min() < y.max() < 1
        found, noise = quantize(y, levels)
        assert torch.equal(found, values.float())
        assert 0 < noise.min() < noise.max() < 1


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_standard_deviations_that_are_none(std):
    with pytest.raises(ValueError, match=f"std.*{std}"):
        TruncatedNormalDequantization(std)


@pytest.mark.parametrize("dequantization", [UniformDequantization(), TruncatedNormalDequantization(0.3)], ids=str)
def test_bits_of_a_uniform_density_of_the_cube(dequantization):
    """Its values are equally probable, log2(levels) bits each, which the bound reaches where the noise is uniform."""
    data = DiscreteImages(torch.randint(4, (5_000, 1, 2, 1)), 4, dequantization=dequantization)
    bits = data.bits_per_dim(torch.zeros(500), data.test.rows)
    noise = torch.as_tensor(stats.truncnorm(-0.5 / 0.3, 0.5 / 0.3, 0, 0.3).entropy())
    lost = 0.0 if isinstance(dequantization, UniformDequantization) else -noise / math.log(2)
    assert abs(bits.mean() - 2 - lost) < 5 * bits.std() / 500**0.5 + 1e-6
    again = data.redrawn(data.test.rows)
    assert torch.equal(quantize(again, 4)[0], quantize(data.test.rows, 4)[0])
    assert (again != data.test.rows).float().mean() > 0.99

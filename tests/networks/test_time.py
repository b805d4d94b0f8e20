import math

import pytest
import torch

from divflow.networks import GaussianFourierEmbedding, NetworkError, SinusoidalEmbedding


def columns(t, frequencies):
    """t, the sines of all frequencies but the first, the cosines of all."""
    return [t, *(math.sin(w * t) for w in frequencies[1:]), *(math.cos(w * t) for w in frequencies)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sinusoidal_is_the_formula(dtype):
    embedding, times = SinusoidalEmbedding(6, max_frequency=25.0), [0.0, 0.3, 1.0, -4.0]
    expected = torch.tensor([columns(t, [1, 5, 25]) for t in times], dtype=dtype)
    # angles reach 100, so float32 rounds them by 4e-6
    tolerance = {"rtol": 0, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(embedding(torch.tensor(times, dtype=dtype)), expected, **tolerance)


def test_gaussian_fourier_is_the_formula():
    embedding, times = GaussianFourierEmbedding(6), [0.0, 0.3, 1.0]
    frequencies = [2 * math.pi * w for w in embedding.frequencies.tolist()]
    expected = torch.tensor([columns(t, frequencies) for t in times], dtype=torch.float64)
    torch.testing.assert_close(embedding(torch.tensor(times, dtype=torch.float64)), expected)


def test_gaussian_fourier_draws_its_frequencies_once_and_saves_them():
    first, second = GaussianFourierEmbedding(2000, scale=3.0), GaussianFourierEmbedding(2000, scale=3.0)
    t = torch.rand(5)
    assert first.frequencies.mean().abs() < 0.5
    assert abs(first.frequencies.std() - 3) < 0.4
    assert torch.equal(first(t), first(t))
    assert not torch.equal(first(t), second(t))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(t), second(t))
    assert not list(first.parameters())


@pytest.mark.parametrize("embedding", [SinusoidalEmbedding(8), GaussianFourierEmbedding(8), SinusoidalEmbedding(2)])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_shape_and_dtype(embedding, dtype, result):
    for size in (0, 1, 3):
        features = embedding(torch.ones(size, dtype=dtype))
        assert features.shape == (size, embedding.features)
        assert features.dtype == result


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SinusoidalEmbedding(7), "features must be even.*7"),
        (lambda: GaussianFourierEmbedding(0), "features must be even.*0"),
        (lambda: GaussianFourierEmbedding(-2), "features must be even.*-2"),
        (lambda: SinusoidalEmbedding(4, max_frequency=0.0), "max_frequency must be positive.*0"),
        (lambda: SinusoidalEmbedding(4, max_frequency=math.inf), "max_frequency must be positive.*inf"),
        (lambda: GaussianFourierEmbedding(4, scale=-1.0), "scale must be positive.*-1"),
        (lambda: GaussianFourierEmbedding(4, scale=math.nan), "scale must be positive.*nan"),
    ],
)
def test_errors(call, message):
    with pytest.raises(NetworkError, match=message):
        call()

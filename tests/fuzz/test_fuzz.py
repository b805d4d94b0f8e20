"""Hostile calls: each equals brute force in float64, or is a typed error."""

import pytest
from fuzz.episodes import episode


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", range(0, 80, 10))
def test_generated_calls(start):
    for seed in range(start, start + 10):
        episode(seed)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", range(0, 2500, 100))
def test_ten_thousand_calls(start):
    for seed in range(start, start + 100):
        episode(seed)

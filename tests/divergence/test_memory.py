"""Peak memory of the exact divergence: bounded by the chunk, in training too, never by D x D."""

import pytest
import torch
from peak_memory import PeakMemory
from torch import nn

from divflow.divergence import Exact, divergence


def peak(size, chunk, train=False, method="reverse", batch=4):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(size, 4), nn.Tanh(), nn.Linear(4, size))
    x = torch.randn(batch, size)
    with PeakMemory() as memory, torch.set_grad_enabled(train):
        div = divergence(lambda t, x: network(x), 0.0, x, Exact(method, chunk_size=chunk))
        if train:
            div.sum().backward()
    return memory.peak


@pytest.mark.parametrize(("method", "train"), [("reverse", False), ("reverse", True), ("forward", False)])
def test_peak_memory_grows_with_the_chunk_and_not_with_the_number_of_dimensions(method, train):
    small, large = peak(784, 64, train, method), peak(3072, 64, train, method)
    # A product is as long as D, so 64 of them grow like D, by 3.9; a (D, D) Jacobian would grow by 15.
    assert large / small < 1.1 * 3072 / 784
    assert peak(3072, 512, train, method) > 5 * large
    assert peak(784, 784, train, method) > 5 * small


def test_without_a_chunk_size_training_keeps_the_graph_of_all_products():
    """What the chunk size saves: the default is faster, and holds on to everything."""
    assert peak(784, None, train=True) > 5 * peak(784, 64, train=True)

"""Samples that are mixed are an error of every estimator, and what keeps a state is distinguished from what mixes."""

import pytest
import torch
from catalogue import KINDS
from torch import nn

from divflow.divergence import (
    Autograd,
    FieldError,
    FieldWarning,
    Hutchinson,
    check_field,
    divergence,
)
from divflow.flow import ContinuousFlow
from divflow.operators import gradient, jacobian, laplacian

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]])


def graph(t, x):
    """Messages along the edges of a graph whose nodes lie along dimension 0."""
    return x + torch.zeros_like(x).index_add(0, EDGES[1], x[EDGES[0]].sin())


def _batch_norm():
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, t, x):
        return self.layers(x)


MIXING = {
    "batch norm": lambda: Layers(_batch_norm()),
    "attention over the batch": lambda: lambda t, x: torch.softmax(x @ x.T, dim=1) @ x,
    "a graph": lambda: graph,
    "a mean": lambda: lambda t, x: x - x.mean(dim=0),
}


@pytest.mark.parametrize("field", MIXING)
@pytest.mark.parametrize("name", KINDS)
def test_mixing_is_an_error_of_every_estimator(name, field):
    field = MIXING[field]()
    for _ in range(3):  # at a call that is not verified, too, once it was seen
        with pytest.raises(FieldError, match="mixes the samples of a batch"):
            divergence(field, 0.0, torch.randn(8, 6), KINDS[name])


@pytest.mark.parametrize("field", MIXING)
def test_of_flows_and_operators_too(field):
    field = MIXING[field]()
    x = torch.randn(8, 6)
    with pytest.raises(FieldError, match="mixes the samples"):
        ContinuousFlow(field, 6).log_prob(x)
    with pytest.raises(FieldError, match="mixes the samples"):
        jacobian(field, 0.0, x)
    with pytest.raises(FieldError, match="mixes the samples"):
        gradient(lambda z: (field(0.0, z) ** 2).sum(1), x)
    with pytest.raises(FieldError, match="mixes the samples"):
        laplacian(lambda z: (field(0.0, z) ** 2).sum(1), x)


def test_samples_with_infinite_or_nan_derivatives_do_not_mix():
    x = torch.randn(4, 3)
    x[1], x[2] = torch.nan, torch.inf
    assert divergence(lambda t, x: x**2, 0.0, x, Hutchinson())[0].isfinite()
    assert divergence(lambda t, x: x.sqrt(), 0.0, torch.zeros(4, 3), Autograd()).isinf().all()


def test_one_edge_is_found_within_a_few_verified_calls():
    def field(t, x):
        return torch.cat([x[:1] + x[5:6] ** 2, x[1:]])

    def calls():
        for _ in range(64):
            divergence(field, 0.0, torch.randn(16, 2), Hutchinson())

    with pytest.raises(FieldError, match="mixes the samples"):
        calls()


@pytest.mark.parametrize("seed", range(20))
def test_a_spectral_norm_in_training_mode_changes_itself_and_mixes_nothing(seed):
    torch.manual_seed(seed)
    norm = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(norm(nn.Linear(6, 32)), nn.Tanh(), norm(nn.Linear(32, 6))).double()
    x = torch.randn(16, 6, dtype=torch.float64)
    with pytest.warns(FieldWarning, match="changes its own state"):
        check_field(lambda t, x: net(x), 0.0, x)
    with pytest.warns(FieldWarning, match="Layers.*changes its own state"):
        check_field(Layers(net), 0.0, x)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.GRUCell(3, 3), None

    def forward(self, t, x):
        self.state = self.cell(x, torch.zeros_like(x) if self.state is None else self.state.detach())
        return self.state


def test_a_recurrent_network_that_keeps_its_state_is_refused_as_what_it_is():
    with pytest.raises(FieldError, match="Remembering.*remembers.*Reset"):
        check_field(Remembering(), 0.0, torch.randn(4, 3))


def test_what_is_checked_is_a_copy():
    layers = _batch_norm().eval()
    net, cell = Layers(layers), Remembering()
    layers.train()
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(FieldError, match=r"layers\.1 is a BatchNorm1d.*eval mode"):
        check_field(net, 0.0, torch.randn(8, 6))
    with pytest.raises(FieldError, match="mixes the samples"):
        check_field(lambda t, x: net(t, x), 0.0, torch.randn(8, 6))
    assert all(map(torch.equal, before, net.buffers()))
    with pytest.raises(FieldError, match="remembers"):
        check_field(lambda t, x: cell(t, x), 0.0, torch.randn(4, 3))
    assert cell.state is None

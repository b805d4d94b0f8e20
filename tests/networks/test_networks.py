import pytest
import torch
from torch import nn

from divflow.divergence import check_field, divergence
from divflow.networks import MLP, ConcatSquash, ConvNet
from divflow.networks.conditioning import NetworkError

NETWORKS = {
    "MLP": lambda **k: MLP((2, 3), hidden=(8, 8), **k),
    "MLP of vectors": lambda **k: MLP(6, hidden=(), **k),
    "ConcatSquash": lambda **k: ConcatSquash((2, 3), hidden=(8, 8), **k),
    "ConvNet 1d": lambda **k: ConvNet((2, 3), hidden=(4,), **k),
    "ConvNet 2d": lambda **k: ConvNet((1, 3, 2), hidden=(4,), **k),
    "ConvNet 3d": lambda **k: ConvNet((1, 3, 2, 1), hidden=(4,), **k),
}
EVENTS = {"MLP of vectors": (6,), "ConvNet 2d": (1, 3, 2), "ConvNet 3d": (1, 3, 2, 1)}


@pytest.mark.parametrize("context_features", [0, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_is_a_field_of_scalar_and_sample_times(name, context_features):
    event, network = EVENTS.get(name, (2, 3)), NETWORKS[name](context_features=context_features)
    x = torch.randn(4, *event)
    context = (torch.randn(4, context_features),) if context_features else ()
    scalar = network(torch.tensor(0.3), x, *context)
    assert scalar.shape == x.shape
    torch.testing.assert_close(network(torch.full((4,), 0.3), x, *context), scalar)
    assert not torch.allclose(network(torch.tensor(0.9), x, *context), scalar)
    times = torch.rand(4)
    for b in range(4):
        alone = network(times[b], x[b : b + 1], *(c[b : b + 1] for c in context))
        torch.testing.assert_close(network(times, x, *context)[b : b + 1], alone)
    check_field(lambda t, x: network(t, x, *context), 0.3, x)
    assert network(torch.tensor(0.3), x[:0], *(c[:0] for c in context)).shape == (0, *event)


@pytest.mark.parametrize("name", NETWORKS)
def test_zero_init_is_the_zero_field_and_learns(name):
    event, network = EVENTS.get(name, (2, 3)), NETWORKS[name](zero_init=True)
    x = torch.randn(4, *event)
    for t in (0.0, 0.7):
        assert network(torch.tensor(t), x).abs().max() == 0
    divergence(network, 0.3, x).sum().backward()
    assert sum(parameter.grad.abs().sum() for parameter in network.parameters() if parameter.grad is not None) > 0


def test_concat_squash_is_the_formula():
    network = ConcatSquash(2, hidden=())
    layer, t, x = network.layers[0], torch.tensor(0.4), torch.randn(3, 2)
    gate = torch.sigmoid(layer.gate.weight[:, 0] * t + layer.gate.bias)
    expected = (x @ layer.linear.weight.T + layer.linear.bias) * gate + layer.shift.weight[:, 0] * t
    torch.testing.assert_close(network(t, x), expected)


def test_activation_is_an_object():
    assert any(isinstance(module, nn.Softplus) for module in MLP(2, activation=nn.Softplus).modules())


def test_float64():
    network = MLP(2).double()
    assert network(torch.tensor(0.3), torch.randn(3, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvNet((3,)), r"\(3,\).*MLP"),
        (lambda: ConvNet((1, 4, 4), kernel_size=2), "odd.*2"),
        (lambda: MLP(2)(torch.tensor(0.0), torch.ones(3, 2), torch.ones(3, 4)), "0 context features, but got 4"),
        (lambda: MLP(2, context_features=4)(torch.tensor(0.0), torch.ones(3, 2)), "4 context features, but got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(NetworkError, match=message):
        call()

"""Local fields: as few products as the receptive field is large, and the same divergence as the loop's."""

import copy
import math
import types

import pytest
import torch
from covering import alternated
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, divergence
from divflow.divergence.exact.colored import colors
from divflow.networks import ConvNet


def convolutions(kind, channels, dilation=1, mode="zeros", kernel=3):
    def layer(n, m):
        padding = dilation * (kernel // 2)
        return kind(n, m, kernel, padding=padding, dilation=dilation, padding_mode=mode)

    return nn.Sequential(layer(channels, 4), nn.SiLU(), layer(4, channels)).double()


# The network, the event, and the least number of colours: all pairs within 2 pixels a direction see each other.
FIELDS = {
    "1-D": (lambda: convolutions(nn.Conv1d, 1), (1, 20), 3),
    "2-D": (lambda: convolutions(nn.Conv2d, 1), (1, 9, 8), 9),
    "3-D": (lambda: convolutions(nn.Conv3d, 1), (1, 4, 8, 8), 27),
    "channels": (lambda: convolutions(nn.Conv2d, 2), (2, 8, 8), 18),
    "dilated": (lambda: convolutions(nn.Conv1d, 1, dilation=2), (1, 24), 3),
    "circular": (lambda: convolutions(nn.Conv2d, 1, mode="circular"), (1, 9, 9), 9),
    "circular, other size": (lambda: convolutions(nn.Conv1d, 1, mode="circular"), (1, 20), 3),
    "reflected": (lambda: convolutions(nn.Conv1d, 2, mode="reflect"), (2, 12), 6),
}


@alternated(name=FIELDS, method=["auto", "colored"])
def test_value_divergence_and_gradients(name, method):
    torch.manual_seed(0)
    make, event, least = FIELDS[name]
    net = make()
    x = torch.randn(3, *event, dtype=torch.float64, requires_grad=True)

    def field(t, x):
        return net(x) * t

    estimator = Exact(method)
    plan = estimator.explain(field, 0.5, x)
    assert plan.method == "colored"
    assert least <= plan.products <= (least if name != "circular, other size" else 5) * 1.5
    results = [estimator(field, 0.5, x) for estimator in (estimator, estimator, Autograd())]
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], rtol=1e-10, atol=1e-10)
        gradients = [
            torch.autograd.grad(
                r.divergence.square().sum(), [x, *net.parameters()], create_graph=True, materialize_grads=True
            )
            for r in (result, results[2])
        ]
        torch.testing.assert_close(*gradients)
        second = [
            torch.autograd.grad(sum(g.square().sum() for g in first), x, retain_graph=True) for first in gradients
        ]
        torch.testing.assert_close(*second)
    with torch.no_grad():
        torch.testing.assert_close(estimator(field, 0.5, x).divergence, results[2].divergence.detach())


def test_found_through_weights_of_zero():
    """A network that starts at zero has no Jacobian to see; its colours are those of the trained one."""
    field, x = ConvNet((1, 9, 9), (4,), zero_init=True).double(), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    assert divergence(field, 0.0, x).abs().max() == 0
    assert Exact().explain(field, 0.0, x).products == 9
    for parameter in field.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))


CHOOSING = {
    "where": lambda net: lambda t, x: torch.where(x > 3, net(x), torch.zeros_like(x)),
    "where in time": lambda net: lambda t, x: torch.where(t > 0.5, net(x), x.sort().values),
    "a mask": lambda net: lambda t, x: net(x).masked_fill(x.abs() < 3, 0.0).norm(dim=-1, keepdim=True) * x,
    "numbers": lambda net: lambda t, x: net(x) if x.max().item() > 3 else x.sort().values,
    "no NaN": lambda net: lambda t, x: torch.fmax(net(x), x.sort().values * 0 + 9).sort().values,
    "indices": lambda net: lambda t, x: net(x)[..., (torch.arange(24) + (10 * t).long()) % 24].sin(),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_seen_elsewhere_is_never_missed(name):
    """What no sample sees where the colours would be found, others see later."""
    net = convolutions(nn.Conv1d, 1)
    field = CHOOSING[name](net)
    small, large = (scale * torch.randn(4, 1, 24, dtype=torch.float64) for scale in (0.01, 100))
    for t, x in ((0.1, small), (0.9, large)):
        torch.testing.assert_close(divergence(field, t, x), divergence(field, t, x, Autograd()))


def test_it_is_not_used_where_the_receptive_field_covers_the_event():
    field = ConvNet((1, 4, 4), (8, 8, 8)).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    plan = Exact().explain(field, 0.0, x)
    assert plan.method == "reverse"
    assert "seen from more than half" in plan.why
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    plan = Exact().explain(lambda t, x: attention(x, x, x)[0], 0.0, torch.randn(2, 9, 4, dtype=torch.float64))
    assert plan.method == "reverse"
    with pytest.raises(FieldError, match="seen from more than half"):
        divergence(field, 0.0, x, Exact("colored"))


def test_new_structure_is_coloured_anew():
    net, x = convolutions(nn.Conv1d, 1), torch.randn(3, 1, 24, dtype=torch.float64)

    def field(t, x):
        return net(x)

    for dilation in (1, 2, 3, 1):
        for layer in (net[0], net[2]):
            layer.dilation, layer.padding = (dilation,), (dilation,)
        torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))


def test_found_once_for_all_batches(monkeypatch):
    net, found = convolutions(nn.Conv1d, 1), []
    find = colors.find
    monkeypatch.setattr(colors, "find", lambda *arguments: found.append(1) or find(*arguments))
    for batch in (3, 3, 5, 1, 0):
        x = torch.randn(batch, 1, 24, dtype=torch.float64)
        # A lambda made anew over the same network is the same field.
        torch.testing.assert_close(
            divergence(lambda t, x: net(x), 0.0, x), divergence(lambda t, x: net(x), 0.0, x, Autograd())
        )
    assert len(found) == 1


def test_a_field_that_refuses_nans_has_no_colours():
    net = convolutions(nn.Conv1d, 1)

    def field(t, x):
        if math.isnan(x.detach().sum().item()):
            raise ValueError("not finite")
        return net(x)

    x = torch.randn(3, 1, 24, dtype=torch.float64)
    assert Exact().explain(field, 0.0, x).method != "colored"
    with pytest.raises(FieldError, match="refuses a NaN"):
        divergence(field, 0.0, x, Exact("colored"))
    torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))


def test_nothing_random_is_used_up():
    net, x = (
        nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv1d(4, 1, 3, padding=1)),
        torch.randn(2, 1, 20),
    )
    results = []
    for estimator in (Exact(), Autograd()):
        torch.manual_seed(0)
        results.append((estimator(lambda t, x: net(x), 0.0, x), torch.rand(3)))
    torch.testing.assert_close(*results)


def _keeps(norm):
    """A local network with a state, which a function reaches in all ways that there are."""
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    module = types.SimpleNamespace(norm=norm)
    reached = {"norm": norm, "conv": conv, "module": module}
    exec("def by_globals(t, x): return conv(norm(x))", reached)
    exec("def by_defaults(t, x, norm=norm): return conv(norm(x))", reached)
    exec("def by_attribute(t, x): return conv(module.norm(x))", reached)
    return [reached[name] for name in ("by_globals", "by_defaults", "by_attribute")] + [lambda t, x: conv(norm(x))]


class Functional(nn.Module):
    """Statistics of the batch, written by one operation that does not say so, and nothing else."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))

    def forward(self, x):
        nn.functional.batch_norm(torch.ones_like(x), self.running_mean, self.running_var, training=True)
        return x.tanh()


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("make", [lambda: nn.InstanceNorm2d(2, track_running_stats=True), Functional])
def test_a_state_is_changed_by_the_one_evaluation_that_was_asked_for(make, way):
    x = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    norm = make().double()
    once = copy.deepcopy(norm)
    once(x)
    field = _keeps(norm)[way]
    div = divergence(field, 0.0, x, Exact())
    for name, kept in norm.named_buffers():
        torch.testing.assert_close(kept, once.get_buffer(name))
    torch.testing.assert_close(div, divergence(field, 0.0, x, Autograd()))

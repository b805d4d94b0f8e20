"""Normalizations in the layered method where numbers are hard: no variance, large entries, low precision, wrong rules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Autograd, Exact, divergence
from divflow.tape import Written
from divflow.tape.table import RULES

W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORMALIZATIONS = {
    "layer_norm": lambda h: F.layer_norm(h, (6,)),
    "rms_norm": lambda h: F.rms_norm(h, (6,)),
    "group_norm": lambda h: F.group_norm(h, 2),
    "instance_norm": lambda h: F.instance_norm(h.view(-1, 2, 3)).flatten(1),
    "softmax": lambda h: F.softmax(h, dim=1),
    "softmin": lambda h: F.softmin(h, dim=1),
    "log_softmax": lambda h: torch.log_softmax(h, dim=1),
    "normalize": lambda h: F.normalize(h, dim=1),
}
POINTS = {
    "no variance": torch.ones(3, 6),
    "zeros": torch.zeros(3, 6),
    "saturated": 1e3 * torch.linspace(-1, 1, 18).view(3, 6),
    "one sample": torch.linspace(-1, 2, 6)[None],
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_at_hard_points(name, point):
    """What autograd has at zero variance, zero norm and saturation is what the closed form has, and its gradient."""
    x = POINTS[point].double()

    def field(t, x):
        return NORMALIZATIONS[name](x) @ W

    results = []
    for estimator in (Exact("layered"), Autograd()):
        z = x.clone().requires_grad_()
        value, div = estimator(field, 0.0, z)
        results.append((value, div, *torch.autograd.grad(div.sum(), z)))
    for actual, expected in zip(*results, strict=True):
        scale = 1 + expected.nan_to_num().abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * scale, equal_nan=True)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_values_keep_their_digits(name):
    """In float32, far from zero, the value is the operation's own, to what its argument's last digits say of it."""
    x = 100 + torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    value, _ = Exact("layered")(lambda t, x: NORMALIZATIONS[name](x), 0.0, x)
    torch.testing.assert_close(value, NORMALIZATIONS[name](x), rtol=0, atol=8 * 100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", sorted(set(NORMALIZATIONS) - {"instance_norm"}))
@pytest.mark.parametrize("wrong", [lambda y, x: y + 1e-2 * x.detach(), lambda y, x: y + 1e-2 * (x - x.detach())])
def test_a_wrong_decomposition_is_refused(name, wrong, monkeypatch):
    """Whether its value is wrong or its derivative alone, even behind a last layer of zeros."""
    right = RULES[name].function
    rule = Written(lambda input, *a, **k: wrong(right(input, *a, **k), input), fused=False)
    monkeypatch.setitem(RULES, name, rule)
    last = nn.Linear(6, 6).double()
    nn.init.zeros_(last.weight)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def field(t, x):
        return last(NORMALIZATIONS[name](x @ W))

    why = Exact().explain(field, 0.0, x).why
    assert f"the derivative of {name} differs" in why or "another value" in why
    for _ in range(2):
        torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))
        nn.init.normal_(last.weight)


def test_low_precision_is_left_to_autograd():
    """Torch normalizes bfloat16 in float32, so the parts would give another value."""
    norm, x = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).bfloat16(), torch.randn(3, 6).bfloat16()

    def field(t, x):
        return norm(x)

    assert "low precision" in Exact().explain(field, 0.0, x).why
    torch.testing.assert_close(Exact()(field, 0.0, x).value, norm(x))


def test_weights_that_are_changed_between_calls():
    norm, first, last = nn.LayerNorm(8).double(), nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    def field(t, x):
        return last(norm(first(x)).tanh())

    for scale in (0.0, 1.0, -3.0):
        nn.init.constant_(norm.weight, scale)
        norm.eps = 1e-5 + abs(scale)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                actual = divergence(field, 0.0, x).detach().clone()
            torch.testing.assert_close(actual, divergence(field, 0.0, x, Autograd()).detach())


class Running(nn.Module):
    """Instance normalization that keeps statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True).double()
        self.norm.running_mean.fill_(1.0)

    def forward(self, t, x):
        return self.norm(x.view(-1, 2, 3)).flatten(1) @ W


def test_running_statistics_are_advanced_once_a_call():
    fields = Running(), Running()
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(3):
        for field, estimator in zip(fields, (Exact(), Autograd()), strict=True):
            divergence(field, 0.0, x, estimator)
        torch.testing.assert_close(fields[0].norm.running_mean, fields[1].norm.running_mean)

"""`Exact("forward")`: torch's rules of forward mode, and those that are wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Exact, FieldError, divergence
from divflow.divergence.exact import forward as forward_mode
from divflow.verification.schedule import severed_fields

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W, V = (torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for s in ((4, 6), (6, 4)))
FORWARD = Exact("forward")


def inverse_of_a_factor(t, x):
    m = torch.cat([x, x[:, :1] ** 2, x * 0.5], dim=1).view(-1, 3, 3)
    factor = torch.linalg.cholesky(m @ m.mT + torch.eye(3))
    return torch.cholesky_inverse(factor).reshape(-1, 9)[:, :4]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_wrong_rule_is_refused_at_every_call(mode):
    with mode():
        for _ in range(4):
            with pytest.raises(FieldError, match="forward mode gives .* reverse mode .*use method='reverse'"):
                divergence(inverse_of_a_factor, 0.0, X, FORWARD)
        assert divergence(inverse_of_a_factor, 0.0, X, Exact("reverse")).isfinite().all()


def test_a_value_that_only_reverse_mode_takes_for_a_constant_is_refused():
    def field(t, x):
        with torch.no_grad():
            scale = x.norm(dim=1, keepdim=True)
        return x * scale

    with (
        severed_fields("allow"),  # by which reverse mode is meant
        pytest.raises(FieldError, match="forward mode does not see"),
    ):
        divergence(field, 0.0, X, FORWARD)


NORMS = {
    "layer_norm": lambda h: F.layer_norm(h, (6,)),
    "torch.ops.aten.layer_norm": lambda h: torch.ops.aten.layer_norm(h, (6,)),
    "torch.ops.aten.layer_norm.default": lambda h: torch.ops.aten.layer_norm.default(h, (6,)),
    "instance_norm": lambda h: F.instance_norm(h.view(-1, 2, 3)).reshape(-1, 6),
    "group_norm": lambda h: F.group_norm(h, 2),
    "rms_norm": lambda h: F.rms_norm(h, (6,)),
    "a module": nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(3, 6)).double(),
}


@pytest.mark.parametrize("name", NORMS)
def test_derivatives_of_normalizations(name):
    def field(t, x):
        return NORMS[name](x @ W).tanh() @ V

    results = []
    for estimator in (FORWARD, Exact("forward", 3), Exact("reverse")):
        for _ in range(3):
            x = X.clone().requires_grad_()
            value, div = estimator(field, 0.0, x)
            (first,) = torch.autograd.grad(div.square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.equal(value, field(0.0, x))
        results.append((div, first, second))
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_a_wrong_derivative_of_a_rule_is_refused_where_it_is_asked_for():
    def field(t, x):
        return torch.native_layer_norm(x @ W, (6,), None, None, 1e-5)[0].tanh() @ V

    with pytest.raises(FieldError, match="the gradient of it"):
        divergence(field, 0.0, X.clone().requires_grad_(), FORWARD)
    with torch.no_grad():
        torch.testing.assert_close(divergence(field, 0.0, X, FORWARD), divergence(field, 0.0, X, Exact("reverse")))


def test_verified_at_calls_1_2_4_8(monkeypatch):
    calls, verified, verify = [], [], forward_mode._verify
    monkeypatch.setattr(forward_mode, "_verify", lambda *a: verified.append(len(calls)) or verify(*a))
    net = nn.Linear(4, 4).double()
    for _ in range(9):
        calls.append(1)
        divergence(lambda t, x: net(x), 0.0, X, FORWARD)  # made anew each time
    assert verified == [1, 2, 4, 8]


def test_random_fields_and_those_that_keep_a_state_are_no_wrong_rules():
    drop, steps = nn.Dropout(0.5), []
    torch.manual_seed(0)
    found, after = divergence(lambda t, x: drop(x) ** 2, 0.0, X, FORWARD), torch.rand(())
    torch.manual_seed(0)
    torch.testing.assert_close(found, (drop(torch.ones_like(X)) ** 2 * 2 * X).sum(1))
    assert torch.equal(after, torch.rand(()))  # the comparison draws nothing of the caller's

    def counts(t, x):
        steps.append(0)
        return x * len(steps)

    assert divergence(counts, 0.0, X, FORWARD).tolist() == [4.0] * 3

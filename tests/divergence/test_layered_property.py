"""Networks that nobody wrote: generated ones, on which the layered method must agree with the loop."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from divflow.divergence import Autograd, Exact
from divflow.verification import severed_fields

FUNCTIONS = [
    torch.tanh, torch.sigmoid, F.silu, F.softplus, F.gelu, F.elu, F.mish, torch.sin, torch.cos, F.leaky_relu, F.relu,
    F.softsign, torch.square, torch.atan, torch.neg, lambda h: h * torch.sigmoid(h), lambda h: h / (1 + h * h),
    lambda h: 1 - h, lambda h: torch.where(h > 0, h, h.exp() - 1), lambda h: h.clamp(-0.7, 0.7), lambda h: h.clone(),
    lambda h: F.layer_norm(h, h.shape[1:]), lambda h: F.rms_norm(h, h.shape[1:], eps=0.1), lambda h: h.softmax(dim=1),
    lambda h: F.log_softmax(h, dim=-1), lambda h: F.group_norm(h, 1, eps=0.3) if h.shape[1] > 1 else h, lambda h: h - h.logsumexp(1, keepdim=True),
    lambda h: h / (1 + h.square().sum(dim=1, keepdim=True)).sqrt(), lambda h: torch.addcmul(h, h, h.cos()), lambda h: h.mul_(0.5), lambda h: (2 / (h * h + 3)) ** 2,
]  # fmt: skip
MOVEMENTS = [
    lambda h: h.flip(1), lambda h: h.roll(1, dims=1), lambda h: h[:, torch.arange(h.shape[1]).roll(2)],
    lambda h: torch.cat([h[:, 1:], h[:, :1]], dim=1), lambda h: h.unsqueeze(1).transpose(1, 2).flatten(1),
    lambda h: torch.cat(h.split(1, dim=1)[::-1], dim=1), lambda h: torch.stack([h, h.flip(1)], dim=2)[..., 0],
    lambda h: h[:, :1].expand(-1, h.shape[1]), lambda h: h - h.mean(dim=1, keepdim=True),
    lambda h: h.cumsum(1), lambda h: torch.cat([h[:, :1].detach(), h[:, 1:]], dim=1),
]  # fmt: skip
STEPS = ["linear", "function", "movement", "gate shared", "gate", "add earlier", "multiply earlier", "append", "split"]


@st.composite
def networks(draw):
    """A function of (t, x), x of `size` entries a sample, as a list of steps."""
    size, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    steps = draw(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1000)), min_size=1, max_size=7))
    seed = draw(st.integers(0, 2**16))
    return size, batch, steps, seed, draw(st.booleans())


def build(size, steps, seed):
    def field(t, x):
        noise = torch.Generator().manual_seed(seed)

        def matrix(n, m):
            return torch.randn(n, m, generator=noise, dtype=torch.float64) / m**0.5

        def linear(h, width):
            return F.linear(h, matrix(width, h.shape[1]), matrix(width, 1)[:, 0])

        h, earlier = x, [x]
        for step, choice in steps:
            previous = earlier[choice % len(earlier)]
            if previous.shape != h.shape:
                previous = linear(previous, h.shape[1])
            if step == "linear":
                h = linear(h, 1 + choice % 5)
            elif step == "function":
                h = FUNCTIONS[choice % len(FUNCTIONS)](h * 1)
            elif step == "movement":
                h = MOVEMENTS[choice % len(MOVEMENTS)](h)
            elif step == "gate shared":
                h = h * matrix(1, h.shape[1]) if choice % 2 else matrix(h.shape[1], 1)[:, 0] * h * t.mean()
            elif step == "gate":
                h = h * matrix(len(x), h.shape[1])
            elif step == "add earlier":
                h = h + previous if choice % 2 else previous - 0.5 * h
            elif step == "multiply earlier":
                h = h * previous
            elif step == "append":
                h = torch.cat([h, matrix(len(x), 1 + choice % 2)], dim=1)[:, choice % 2 :]
            elif h.shape[1] > 1:
                a, b = h.tensor_split(2, dim=1)
                h = torch.cat([b, torch.sin(a)], dim=1)
            earlier.append(h.clone())
        return h if h.shape[1] == size and steps[-1][1] % 3 else linear(h, size)

    return field


def generated(count):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@generated(100)
@given(networks())
def test_generated_networks(network):
    check(network)


@pytest.mark.slow
@generated(1_000)
@given(networks())
def test_more_generated_networks(network):
    check(network)


def check(network):
    size, batch, steps, seed, per_sample = network
    field = build(size, steps, seed)
    noise = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, size, generator=noise, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.2, 0.8, batch, dtype=torch.float64) if per_sample else torch.tensor(0.4, dtype=torch.float64)
    for estimator in (Exact("layered"), Exact()):
        with severed_fields("allow"):
            expected, actual = Autograd()(field, t, x), estimator(field, t, x)
        scale = 1 + expected.divergence.abs().max().item() + expected.value.abs().max().item()
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10 * scale)
        gradients = [
            torch.autograd.grad(result.divergence.sum(), x, materialize_grads=True)[0]
            if result.divergence.requires_grad
            else torch.zeros_like(x)
            for result in (actual, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9 * (1 + gradients[1].abs().max().item()))

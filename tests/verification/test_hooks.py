"""Fields within hooks of the user's: checkpoints, kernels of attention."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from catalogue import KINDS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from divflow.divergence import (
    Exact,
    FieldError,
    divergence,
)
from divflow.flow import ContinuousFlow
from divflow.operators import laplacian

ESTIMATORS = KINDS | {"layered": Exact("layered"), "in chunks": Exact("reverse", chunk_size=2)}


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 6)
        self.on, self.reentrant = True, reentrant

    def forward(self, t, x):
        def part(z):
            return self.last(torch.tanh(self.norm(self.first(z))))

        return x + (checkpoint(part, x, use_reentrant=self.reentrant) if self.on else part(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_checkpointed_field_is_what_it_is_without(name, mode):
    """At verified calls and others, for one shape after another, with its gradients."""
    field = Checkpointed().double()
    for batch in (4, 3):
        x = torch.randn(batch, 6, dtype=torch.float64)
        for call in range(4):
            found = []
            for field.on in (True, False):
                torch.manual_seed(call)
                with mode():
                    trace = divergence(field, 0.0, x, ESTIMATORS[name])
                found.append([trace.detach()])
                if mode is torch.enable_grad:
                    found[-1] += torch.autograd.grad(trace.sum(), list(field.parameters()), materialize_grads=True)
            for with_it, without in zip(*found, strict=True):
                torch.testing.assert_close(with_it, without, rtol=1e-9, atol=1e-11)


def test_a_closed_form_goes_through_a_checkpoint():
    assert Exact().explain(Checkpointed(), 0.0, torch.randn(4, 6)).method == "layered"


def test_a_laplacian_goes_through_a_checkpoint():
    def f(x):
        return checkpoint(lambda z: (z.sin() * z).sum(1), x, use_reentrant=False)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        value = laplacian(f, x)
        torch.testing.assert_close(value, (2 * x.cos() - x * x.sin()).sum(1))
        (gradient,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(gradient, (-3 * x.sin() - x * x.cos()).detach())


def test_a_flow_of_a_checkpointed_velocity_trains():
    field = Checkpointed().double()
    x, gradients = torch.randn(4, 6, dtype=torch.float64), []
    for field.on in (True, False):
        loss = ContinuousFlow(field, 6).log_prob(x).sum()
        gradients.append(torch.autograd.grad(loss, list(field.parameters()), materialize_grads=True))
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"layered"}))
def test_a_reentrant_checkpoint_is_refused_by_its_name(name):
    for _ in range(3):
        with pytest.raises(FieldError, match="use_reentrant=False"):
            divergence(Checkpointed(reentrant=True), 0.0, torch.randn(4, 6), ESTIMATORS[name])


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"layered"}))
def test_a_kernel_without_second_derivatives_is_refused_where_these_are_needed(name):
    weight = torch.randn(4, 4, requires_grad=True)

    def field(t, x, kernels=(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)):
        h = (x @ weight).view(-1, 1, 2, 2)
        with sdpa_kernel(list(kernels)) if kernels else contextlib.nullcontext():
            return F.scaled_dot_product_attention(h, h, h).flatten(1)

    x = torch.randn(3, 4)
    for _ in range(3):
        with pytest.raises(FieldError, match=r"SDPBackend\.MATH"):
            divergence(field, 0.0, x, ESTIMATORS[name])
    found = []
    for kernels in ((SDPBackend.FLASH_ATTENTION, SDPBackend.MATH), ()):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(divergence(lambda t, x, kernels=kernels: field(t, x, kernels), 0.0, x, ESTIMATORS[name]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_forward_mode_refuses_a_checkpoint_where_a_gradient_is_wanted():
    field, x = Checkpointed(), torch.randn(4, 6)
    for _ in range(3):
        with pytest.raises(FieldError, match="can't be checkpointed. Use method='reverse'"):
            divergence(field, 0.0, x, Exact("forward"))
        with torch.no_grad():
            torch.testing.assert_close(
                divergence(field, 0.0, x, Exact("forward")), divergence(field, 0.0, x), rtol=1e-4, atol=1e-5
            )

"""What generated calls have found."""

import math

import pytest
import torch
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, divergence
from divflow.flow import ContinuousFlow
from divflow.operators import parameter_jacobian
from divflow.solver import Solver


def test_inference_mode_leaves_nothing_behind_that_training_can_not_use():
    def field(t, x):
        return torch.roll(x, 1, 3) * x

    x = torch.randn(2, 4, 4, 4)
    with torch.inference_mode():
        expected = divergence(field, 0.0, x)
    torch.testing.assert_close(divergence(field, 0.0, x.requires_grad_()).detach(), expected)


def test_a_hook_that_refuses_the_trial_of_batched_products_costs_no_call():
    """It is given None in the derivatives of products, which the trial takes and nobody has asked for."""
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def field(t, x):
        h = x * 1.0
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 0.5)
        return nn.functional.conv2d(h, weight, padding=2, dilation=2)

    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        divergence(field, 0.0, x, Exact("reverse"), detached=True), divergence(field, 0.0, x, Autograd(), detached=True)
    )


@pytest.mark.parametrize("k", [1, 2])
def test_a_velocity_of_scalar_times_is_recognised_by_one_sample(k):
    """Where it reads one time of several, it was evaluated at 15 nodes as if they were all at the first."""
    flow = ContinuousFlow(lambda t, x: x * float(t.reshape(-1)[0]), 2, solver=Solver(rtol=1e-8, atol=1e-8)).double()
    x = torch.ones(k, 2, dtype=torch.float64)
    z = math.exp(-0.5)
    torch.testing.assert_close(flow.log_prob(x), x.new_full((k,), -(z**2) - math.log(2 * math.pi) - 1))


def test_a_division_by_zero_is_the_field_s_own():
    x = torch.ones(2, 3)
    assert divergence(lambda t, x: x / 0.0, 0.0, x).isinf().all()


def test_parameter_jacobian_of_no_samples():
    net = nn.Linear(2, 3)
    assert parameter_jacobian(lambda p, x: nn.functional.linear(x, p["weight"]).reshape(1, -1), torch.zeros(0, 2),
                              parameters={"weight": net.weight})["weight"].shape == (0, 3, 3, 2)  # fmt: skip


def test_parameter_jacobian_names_what_torch_can_not_batch():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    with pytest.raises(FieldError, match="all samples at once"):
        parameter_jacobian(lambda p, x: Twice.apply(x * p["a"]), torch.ones(2, 2), parameters={"a": torch.ones(2)})

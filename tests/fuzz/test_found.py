"""What generated calls have found."""

import torch
from torch import nn

from divflow.divergence import Autograd, Exact, divergence


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
    torch.testing.assert_close(divergence(field, 0.0, x, Exact("reverse")), divergence(field, 0.0, x, Autograd()))

"""What generated calls have found."""

import torch

from divflow.divergence import divergence


def test_inference_mode_leaves_nothing_behind_that_training_can_not_use():
    def field(t, x):
        return torch.roll(x, 1, 3) * x

    x = torch.randn(2, 4, 4, 4)
    with torch.inference_mode():
        expected = divergence(field, 0.0, x)
    torch.testing.assert_close(divergence(field, 0.0, x.requires_grad_()).detach(), expected)

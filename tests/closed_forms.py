"""Flows whose density is known: linear velocities carry Gaussians to Gaussians."""

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal


class LinearVelocity(nn.Module):
    """v(t, x) = s(t) (A x + b) over flattened events, s(t) = 1 + t / 2; divergence s(t) tr A, not zero."""

    def __init__(self, event: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        size = torch.Size(event).numel()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(0.5 * torch.randn(size, size, dtype=dtype, generator=generator))
        self.b = nn.Parameter(torch.randn(size, dtype=dtype, generator=generator))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        speed = 1 + t.reshape(-1, 1) / 2
        return (speed * (x.reshape(len(x), -1) @ self.A.T + self.b)).view_as(x)


def carried_normal(velocity: LinearVelocity, t_base: float, t_data: float) -> MultivariateNormal:
    """The density at t_data of a standard normal at t_base."""
    duration = (t_data + t_data**2 / 4) - (t_base + t_base**2 / 4)  # the integral of s(t)
    size = len(velocity.b)
    generator = torch.zeros(size + 1, size + 1, dtype=velocity.A.dtype)
    generator[:size, :size], generator[:size, size] = velocity.A.detach(), velocity.b.detach()
    propagator = torch.linalg.matrix_exp(duration * generator)
    matrix, mean = propagator[:size, :size], propagator[:size, size]
    return MultivariateNormal(mean, matrix @ matrix.T)

"""Gaussian data, whose score is known at every time of an SDE: s(t, x) = -(alpha^2 C + sigma^2 I)^-1 (x - alpha m)."""

import torch
from torch import Tensor, nn

from divflow.score import SDE


class Gaussian:
    """Normal data over events of any shape, in float64, with a full covariance of eigenvalues 0.2 to 1.5."""

    def __init__(self, event: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        size = torch.Size(event).numel()
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        self.event = event
        self.covariance = basis @ torch.diag(torch.linspace(0.2, 1.5, size, dtype=torch.float64)) @ basis.T
        self.mean = torch.randn(size, generator=generator, dtype=torch.float64)

    def sample(self, count: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + noise @ torch.linalg.cholesky(self.covariance).T).view(count, *self.event)

    def covariance_at(self, sde: SDE, t: float | Tensor) -> Tensor:
        alpha, sigma = sde.marginal(torch.as_tensor(t, dtype=torch.float64))
        return alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)

    def score(self, sde: SDE) -> "PerturbedScore":
        return PerturbedScore(self, sde)


class PerturbedScore(nn.Module):
    """The true score of perturbed Gaussian data; t is a scalar or one time a sample."""

    def __init__(self, data: Gaussian, sde: SDE) -> None:
        super().__init__()
        values, basis = torch.linalg.eigh(data.covariance)
        self.values, self.basis = nn.Parameter(values), nn.Parameter(basis)
        self.mean, self.sde = nn.Parameter(data.mean), sde

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = (value.reshape(-1, 1) for value in (self.sde.mean_scale(t), self.sde.std(t)))
        centred = (x.flatten(1) - alpha * self.mean) @ self.basis
        return -(centred / (alpha**2 * self.values + sigma**2) @ self.basis.T).view_as(x)


class LinearScore(nn.Module):
    """s(t, x) = -P (x - m), P and m to be learnt."""

    def __init__(self, precision: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.precision, self.mean = nn.Parameter(precision.clone()), nn.Parameter(mean.clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -((x.flatten(1) - self.mean) @ self.precision.T).view_as(x)


class SmoothScore(nn.Module):
    """A nonlinear score of any event shape, in float64."""

    def __init__(self, event: tuple[int, ...]) -> None:
        super().__init__()
        size = torch.Size(event).numel()
        generator = torch.Generator().manual_seed(2)
        self.first = nn.Parameter(torch.randn(12, size, generator=generator, dtype=torch.float64) / size**0.5)
        self.last = nn.Parameter(torch.randn(size, 12, generator=generator, dtype=torch.float64) / 12**0.5)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(x.flatten(1) @ self.first.T) @ self.last.T - x.flatten(1) / 2).view_as(x)

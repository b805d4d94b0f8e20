"""A mixture of isotropic Gaussians, of which everything that generative models learn is known in closed form."""

import math

import torch
from torch import Tensor


class Mixture:
    """Two components N(+-m, s_k^2 I) over events of any shape, in float64: of mean zero, which no base leaves out.

    Args:
        event: shape of one sample.
        total_variance: E |x|^2 / D, of which 0.16 and 0.36 belong to the components; one, unless given.
    """

    def __init__(self, event: tuple[int, ...], total_variance: float = 1.0) -> None:
        size = math.prod(event)
        direction = torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        self.event, self.stds = event, torch.tensor([0.4, 0.6], dtype=torch.float64)
        scale = math.sqrt(size * (total_variance - self.stds.square().mean().item()))
        self.means = torch.stack([direction, -direction]) * scale / direction.norm()

    def sample(self, count: int) -> Tensor:
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64)
        which = torch.arange(count) % 2
        return (self.means[which] + self.stds[which, None] * noise).view(count, *self.event)

    def log_prob(self, x: Tensor, blur: float = 0.0) -> Tensor:
        """Of the mixture with further noise of standard deviation `blur`."""
        variances = self.stds.square() + blur**2
        return self._log_joint(x.flatten(1), torch.ones(1, 1, dtype=x.dtype), variances).logsumexp(dim=1)

    def predictions(self, x: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The means of data and noise given x = signal * data + sigma * noise; signal and sigma `()` or `(k,)`."""
        flat, signal, sigma = x.flatten(1), signal.reshape(-1, 1), sigma.reshape(-1, 1)
        variances = signal**2 * self.stds**2 + sigma**2
        share = self._log_joint(flat, signal, variances).softmax(dim=1)[..., None]
        scaled = (flat[:, None] - signal[..., None] * self.means) / variances[..., None]
        data = self.means + (signal * self.stds**2)[..., None] * scaled
        return (share * data).sum(dim=1).view_as(x), (sigma * (share * scaled).sum(dim=1)).view_as(x)

    def _log_joint(self, flat: Tensor, signal: Tensor, variances: Tensor) -> Tensor:
        distances = (flat[:, None] - signal[..., None] * self.means).square().sum(dim=2)
        return -distances / (2 * variances) - flat.shape[1] / 2 * (2 * math.pi * variances).log() - math.log(2)


def over(values: Tensor, x: Tensor) -> Tensor:
    """Numbers `()` or `(k,)` as factors of x `(k, *event)`."""
    return values.reshape(-1, *[1] * (x.ndim - 1))

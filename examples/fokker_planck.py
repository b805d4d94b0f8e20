"""A Fokker-Planck equation in ten dimensions as a residual loss, with exact Laplacian, gradient and divergence.

    python examples/fokker_planck.py --steps 1000

For dX = f(X) dt + sqrt(2) dW the log-density u = log p solves

    du/dt = -div f - f . grad u + lap u + |grad u|^2

(Risken 1996, section 4.7, divided by p). Drift and start are such that the solution is known: f(x) = (W - 1) x with W antisymmetric, from
a mixture of normal densities, whose means then turn and shrink, and whose variance goes to 1. The network learns u by the mean
squared residual along the paths of the process; how far it is from the solution is printed.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, vmap

from divflow.divergence import divergence
from divflow.operators import gradient, value_gradient_laplacian

DIMENSIONS, COMPONENTS, VARIANCE, LAST = 10, 3, 0.5, 0.5

LogDensity = Callable[[Tensor, Tensor], Tensor]


class Problem:
    """Drift, start and solution; `seed` draws the rotation and the means."""

    def __init__(self, size: int = DIMENSIONS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.randn(size, size, generator=generator) / math.sqrt(size)
        self.matrix = mixed - mixed.T - torch.eye(size)
        self.means = 1.5 * torch.randn(COMPONENTS, size, generator=generator)

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        """The drift f(x), `(k, D)`."""
        return x @ self.matrix.T

    def log_density(self, t: Tensor, x: Tensor) -> Tensor:
        """The solution u(t, x), `(k,)`, at times t `(k, 1)` and places x `(k, D)`: that of a mixture.

        mean(t) = expm((W - 1) t) mean(0)      variance(t) = variance(0) exp(-2 t) + 1 - exp(-2 t)
        """
        means, variance = self._moments(t)
        squares = (x[:, None] - means).square().sum(dim=2) / (2 * variance)
        normalization = x.shape[1] / 2 * (2 * math.pi * variance).log()[:, 0]
        return (-squares).logsumexp(dim=1) - math.log(COMPONENTS) - normalization

    def sample(self, t: Tensor) -> Tensor:
        """Places of the process at times t `(k, 1)`, `(k, D)`."""
        means, variance = self._moments(t)
        chosen = means[torch.arange(len(t)), torch.randint(COMPONENTS, (len(t),))]
        return chosen + variance.sqrt() * torch.randn_like(chosen)

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means `(k, components, D)` and variance `(k, 1)`."""
        shrunk = (-2 * t).exp()
        turned = torch.linalg.matrix_exp(self.matrix * t[:, :, None])
        return self.means @ turned.mT, VARIANCE * shrunk + 1 - shrunk


class Network(nn.Module):
    """The log-density u(t, x): the start's, and t times a network."""

    def __init__(self, problem: Problem, size: int = DIMENSIONS, hidden: int = 128) -> None:
        super().__init__()
        self.means = problem.means
        self.layers = nn.Sequential(
            nn.Linear(size + 1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Of times `(k, 1)` and places `(k, D)`: `(k,)`."""
        squares = (x[:, None] - self.means).square().sum(dim=2) / (2 * VARIANCE)
        start = (-squares).logsumexp(dim=1) - math.log(COMPONENTS) - x.shape[1] / 2 * math.log(2 * math.pi * VARIANCE)
        return start + t[:, 0] * self.layers(torch.cat([x, t], dim=1))[:, 0]


def residual(problem: Problem, u: LogDensity, t: Tensor, x: Tensor) -> Tensor:
    """By divflow: value, gradient and Laplacian from one evaluation."""
    _, slope, laplacian = value_gradient_laplacian(lambda z: u(t, z), x)
    rate = gradient(lambda s: u(s, x), t)[:, 0]
    drift = problem.drift(t, x)
    transport = divergence(problem.drift, 0.0, x) + (drift * slope).sum(dim=1)
    return rate + transport - laplacian - slope.square().sum(dim=1)


def residual_by_torch_func(problem: Problem, u: LogDensity, t: Tensor, x: Tensor) -> Tensor:
    """By torch.func: whole Hessians and Jacobians, of which the diagonals are taken."""

    def one(t: Tensor, x: Tensor) -> Tensor:
        def at(t: Tensor, x: Tensor) -> Tensor:
            return u(t[None], x[None])[0]

        slope, curvature = grad(at, 1)(t, x), hessian(at, 1)(t, x)
        drift = problem.drift(t, x[None])[0]
        spreading = jacrev(lambda z: problem.drift(t, z[None])[0])(x).diagonal().sum()
        return grad(at, 0)(t, x)[0] + spreading + drift @ slope - curvature.diagonal().sum() - slope @ slope

    return vmap(one)(t, x)


def main(steps: int, batch: int = 256) -> tuple[float, float]:
    """Train; returns the root mean square error of u at the last time, before and after."""
    torch.manual_seed(0)
    problem = Problem()
    network = Network(problem)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = error(problem, network)
    for step in range(steps):
        t = LAST * torch.rand(batch, 1)
        loss = residual(problem, network, t, problem.sample(t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: mean squared residual {loss:.3g}")
    after = error(problem, network)
    print(f"log p at t = {LAST}, root mean square error in nats: {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


@torch.no_grad()
def error(problem: Problem, network: Network, count: int = 2000) -> float:
    """Root mean square of u - log p at the last time, over places of the process."""
    t = torch.full((count, 1), LAST)
    x = problem.sample(t)
    return (network(t, x) - problem.log_density(t, x)).square().mean().sqrt().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    main(parser.parse_args().steps)

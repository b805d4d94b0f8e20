"""The ground state of helium by variational Monte Carlo: the Laplacian of a network is the kinetic energy that is minimized.

    python examples/helium.py --steps 500

The energy of a wave function psi(r_1, r_2) of two electrons is the mean of the local energy over places drawn from psi^2, in Hartree

    E = -(lap log psi + |grad log psi|^2) / 2 - 2 / r_1 - 2 / r_2 + 1 / r_12

(Foulkes et al. 2001). psi has the cusps that E is finite by where electrons meet the nucleus or each other (Kato 1957), and a
network of smooth distances. The energy's gradient is 2 mean((E - mean E) grad log psi) in the network's parameters. The exact energy is
-2.903724 (Pekeris 1958), that of electrons that do not see each other's places, Hartree-Fock's, -2.861680.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

from divflow.operators import value_gradient_laplacian

EXACT, HARTREE_FOCK = -2.903724, -2.861680


class WaveFunction(nn.Module):
    """The logarithm of psi, `(k,)`, at places of both electrons `(k, 2, 3)`; it is the same when they are exchanged."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """-2 r_1 - 2 r_2 + r_12 / (2 + 2 r_12) + a network of sqrt(1 + r^2) of the three distances."""
        first, second = x[:, 0].square().sum(dim=1), x[:, 1].square().sum(dim=1)
        apart = (x[:, 0] - x[:, 1]).square().sum(dim=1)
        between = apart.sqrt()
        smooth = (1 + torch.stack([first, second, apart], dim=1)).sqrt()
        network = self.layers(smooth)[:, 0] + self.layers(smooth[:, [1, 0, 2]])[:, 0]
        return network + between / (2 + 2 * between) - 2 * (first.sqrt() + second.sqrt())


def potential(x: Tensor) -> Tensor:
    """Of the nucleus and of the electrons between them, `(k,)`."""
    return 1 / (x[:, 0] - x[:, 1]).norm(dim=1) - (2 / x.norm(dim=2)).sum(dim=1)


def local_energy(log_psi: nn.Module, x: Tensor) -> Tensor:
    """By divflow: value, gradient and Laplacian from one evaluation."""
    _, slope, laplacian = value_gradient_laplacian(log_psi, x)
    return potential(x) - (laplacian + slope.square().sum(dim=(1, 2))) / 2


def local_energy_by_torch_func(log_psi: nn.Module, x: Tensor) -> Tensor:
    """By torch.func: whole Hessians, of which the diagonals are taken."""

    def one(flat: Tensor) -> Tensor:
        return log_psi(flat.view(1, 2, 3))[0]

    slope, curvature = vmap(grad(one))(x.flatten(1)), vmap(hessian(one))(x.flatten(1))
    laplacian = curvature.diagonal(dim1=1, dim2=2).sum(dim=1)
    return potential(x) - (laplacian + slope.square().sum(dim=1)) / 2


@torch.no_grad()
def moved(log_psi: nn.Module, x: Tensor, moves: int, width: float = 0.4) -> Tensor:
    """Places after some moves of Metropolis in psi^2."""
    value = log_psi(x)
    for _ in range(moves):
        proposed = x + width * torch.randn_like(x)
        new = log_psi(proposed)
        taken = torch.rand(len(x)) < (2 * (new - value)).exp()
        x, value = torch.where(taken[:, None, None], proposed, x), torch.where(taken, new, value)
    return x


@torch.no_grad()
def energy(log_psi: nn.Module, x: Tensor, rounds: int) -> tuple[float, float]:
    """Mean and standard error, of walkers that do not depend on each other."""
    total = torch.zeros(len(x))
    for _ in range(rounds):
        x = moved(log_psi, x, 10)
        total += local_energy(log_psi, x)
    walkers = total / rounds
    return walkers.mean().item(), (walkers.std() / len(x) ** 0.5).item()


def main(steps: int, walkers: int = 1024, rounds: int = 100) -> tuple[float, float]:
    """Train; returns the energy and its standard error in Hartree."""
    torch.manual_seed(0)
    log_psi = WaveFunction()
    optimizer = torch.optim.Adam(log_psi.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    x = moved(log_psi, torch.randn(walkers, 2, 3), 200)
    for step in range(steps):
        x = moved(log_psi, x, 10)
        with torch.no_grad():
            local = local_energy(log_psi, x)
            center = local.median()
            # Where electrons nearly meet, the little that is left of a cusp's error must not rule a step.
            spread = 5 * (local - center).abs().mean()
            excess = local.clamp(center - spread, center + spread)
        loss = 2 * ((excess - excess.mean()) * log_psi(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: {local.mean():.4f} Hartree, standard deviation {local.std():.3f}")
    found, error = energy(log_psi, moved(log_psi, x, 50), rounds)
    print(f"{found:.5f} ± {error:.5f} Hartree; exact {EXACT}, Hartree-Fock {HARTREE_FOCK}")
    return found, error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the optimizer")
    main(parser.parse_args().steps)

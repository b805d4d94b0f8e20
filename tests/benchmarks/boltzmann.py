"""Exact likelihoods of particles: seconds of 10,000, against a trace by products inside the ODE; and what one probe does to weights.

    python tests/benchmarks/boltzmann.py

What tbg and bgflow do is written out here: their ODE carries the log-density along, and sums the diagonal of the Jacobian
by one product after another, or takes one fixed Rademacher probe. Network, tolerance and samples are the same.
"""

import sys
from pathlib import Path

import torch
from torch import Generator, Tensor
from torchdiffeq import odeint

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from timing import medians  # noqa: E402 - the folder is no package

from divflow.bases import MeanFreeNormal  # noqa: E402
from divflow.energies import DoubleWell, LennardJones, PairEnergy, Tempering, quartet  # noqa: E402
from divflow.flow import ContinuousFlow  # noqa: E402
from divflow.likelihood import Quadrature  # noqa: E402
from divflow.matching import ConditionalFlowMatching  # noqa: E402
from divflow.networks import HollowEGNN  # noqa: E402
from divflow.solver import Solver  # noqa: E402

Row = tuple[str, str, str, str]
SAMPLERS = {4: Tempering(rungs=8, power=2.0, std=2.0, thin=6), 13: Tempering(warm_up=150, thin=4, leapfrog=8)}


@torch.enable_grad()
def trained(energy: PairEnergy, steps: int, num_data: int = 20_000) -> tuple[ContinuousFlow, Tensor, Tensor]:
    """A flow matched to samples of an energy, the samples in its units, and their scale."""
    torch.manual_seed(0)
    x = SAMPLERS[energy.particles](energy, num_data, Generator().manual_seed(0)).samples
    scale = x.std()
    x = x / scale
    velocity = HollowEGNN(energy.event_shape, mean_free=True)
    solver = Solver("dopri5", rtol=1e-5, atol=1e-5)
    flow = ContinuousFlow(velocity, energy.event_shape, base=MeanFreeNormal(energy.event_shape), solver=solver)
    optimizer = torch.optim.Adam(velocity.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = x[torch.randint(len(x), (256,))]
        optimizer.zero_grad()
        ConditionalFlowMatching()(velocity, rows, noise=flow.base.sample(256, None)).mean().backward()
        optimizer.step()
        schedule.step()
    return flow.replace(likelihood=Quadrature(31)), x, scale


def augmented(
    flow: ContinuousFlow, x: Tensor, t_start: float, t_end: float, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State and log-determinant by one ODE for both: a trace by products, or by one fixed probe."""

    def dynamics(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = state[0].requires_grad_()
            value = flow.velocity(t, y)
            if probe is None:
                flat, trace = value.flatten(1), torch.zeros(len(y))
                for i in range(flat.shape[1]):
                    trace = trace + torch.autograd.grad(flat[:, i].sum(), y, retain_graph=True)[0].flatten(1)[:, i]
            else:
                (product,) = torch.autograd.grad((value * probe).sum(), y)
                trace = (product * probe).flatten(1).sum(dim=1)
        return value.detach(), trace.detach()

    times = torch.tensor([t_start, t_end])
    states, log_dets = odeint(dynamics, (x, torch.zeros(len(x))), times, method="dopri5", rtol=1e-5, atol=1e-5)
    return states[-1], log_dets[-1]


@torch.no_grad()
def seconds(energy: PairEnergy, name: str, steps: int, batch: int) -> list[Row]:
    """Seconds of 10,000 likelihoods, from those of a batch."""
    flow, x, _ = trained(energy, steps, 2_000)
    x = x[:batch]

    def by_products() -> Tensor:
        z, log_det = augmented(flow, x, 1.0, 0.0, None)
        return flow.base.log_prob(z) + log_det

    ways = {"own": lambda: flow.log_prob(x), "products": by_products}
    difference = (ways["own"]() - ways["products"]()).abs().mean().item()
    time = {way: s * 10_000 / batch for way, s in medians(ways, 10.0).items()}
    found = f"**{time['products'] / time['own']:.1f}** ({time['own']:.0f} against {time['products']:.0f} s, mean difference {difference:.0e} nats)"
    return [(f"10,000 exact likelihoods, {name}", "brute-force trace in the ODE", "10 times faster", found)]


@torch.no_grad()
def probes(steps: int, count: int) -> list[Row]:
    """log Z of DW4 from weights by exact densities, and by one probe fixed for each solve."""
    energy = DoubleWell()
    flow, _, scale = trained(energy, steps)
    generator = Generator().manual_seed(1)
    z = flow.base.sample(count, generator)
    probe = torch.randint(0, 2, z.shape, generator=generator) * 2.0 - 1
    known, shift, found = quartet(energy, energy.d0).log_normalizer, 6 * scale.log(), []
    # The exact densities by the same ODE, so that the probe is all that differs.
    for name, each in (("exact", None), ("one fixed probe", probe)):
        y, log_det = augmented(flow, z, 0.0, 1.0, each)
        log_weights = (-energy(y * scale) + shift - flow.base.log_prob(z) + log_det).double()
        total = log_weights.logsumexp(dim=0)
        size = (-(2 * (log_weights - total)).logsumexp(dim=0)).exp()
        error = ((count / size - 1) / (count - 1)).sqrt()
        off = total - torch.tensor(count).log() - known
        found.append(f"{name}: {off:+.3f} ± {error:.3f}, effective sample size {100 * size / count:.1f} %")
    return [
        (
            f"log Z of DW4 from {count} weighted samples, less that by quadrature",
            "one probe fixed a solve",
            "",
            "; ".join(found),
        )
    ]


def rows() -> list[Row]:
    """All of it."""
    return seconds(DoubleWell(), "DW4", 300, 500) + seconds(LennardJones(), "LJ13", 100, 50) + probes(2_000, 4_000)


if __name__ == "__main__":
    for row in rows():
        print("| " + " | ".join(row) + " |")

"""A Boltzmann generator of four particles in the plane: from an energy to expectations that are right for any flow.

    python examples/boltzmann_generator.py

samples the double well DW4 by parallel tempering, trains a flow on the samples by flow matching, and weights the flow's own samples by
exact densities towards exp(-U): the effective sample size says how near the flow is, log Z and the free energy of the outer
well beside the inner one are estimated, and compared with quadrature. Some minutes on two cores.
"""

import argparse

import torch
from torch import Generator, Tensor

from divflow.distributions import MeanFreeNormal
from divflow.energies import DoubleWell, Tempering, quartet
from divflow.flow import ContinuousFlow
from divflow.matching import ConditionalFlowMatching, EquivariantCoupling
from divflow.networks import HollowEGNN
from divflow.solver import Solver


def trained_flow(x: Tensor, steps: int, hidden: int = 64, batch: int = 128) -> ContinuousFlow:
    """A flow of particles `(n, 4, 2)` without centre of mass, fitted to the velocities of straight paths from noise."""
    event = tuple(x.shape[1:])
    # Messages that never pass through the particle that they are for: an exact divergence at the price of two or three values.
    velocity = HollowEGNN(event, hidden=hidden, mean_free=True)
    flow = ContinuousFlow(velocity, event, base=MeanFreeNormal(event), solver=Solver("dopri5", rtol=1e-5, atol=1e-5))
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    objective = ConditionalFlowMatching(coupling=EquivariantCoupling())  # noise turned and renumbered towards its datum
    for step in range(steps):
        rows = x[torch.randint(len(x), (batch,))]
        loss = objective(velocity, rows, noise=flow.base.sample(batch, None)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    return flow


def main(steps: int = 5_000, num_data: int = 50_000, num_weighted: int = 10_000, hidden: int = 64) -> dict[str, float]:
    """Train, weight and compare; returns the effective sample size as a share, and errors in units of their standard errors."""
    torch.manual_seed(0)
    energy, seed = DoubleWell(), Generator().manual_seed(0)
    data = Tempering(rungs=8, power=2.0, std=2.0)(energy, num_data, seed).samples
    scale = data.std()
    flow = trained_flow(data / scale, steps, hidden)

    freedom = 3 * 2  # of four particles in the plane, the centre of mass at rest
    with torch.no_grad():
        found = flow.importance_weights(
            lambda y: -energy(y * scale) + freedom * scale.log(), num_weighted, seed, batch_size=1_000
        )
    x, weights = found.samples * scale, found.log_weights.exp()
    outer = weights @ energy.extended(x)
    outer_error = (weights.square() @ (energy.extended(x) - outer).square()).sqrt()
    known = quartet(energy, energy.d0)

    share = float(found.effective_sample_size) / num_weighted
    print(f"effective sample size {100 * share:.1f} % of {num_weighted}")
    print(f"log Z {found.log_normalizer:.4f} ± {found.standard_error:.4f}, by quadrature {known.log_normalizer:.4f}")
    print(f"a pair in the outer well: {outer:.4f} ± {outer_error:.4f}, by quadrature {known.beyond:.4f}")
    print(
        f"mean energy of the flow's samples {energy(x).mean():.3f}, weighted {weights @ energy(x):.3f}, of the data {energy(data).mean():.3f} kT"
    )
    return {
        "effective_sample_fraction": share,
        "log_normalizer_deviation": float((found.log_normalizer - known.log_normalizer) / found.standard_error),
        "outer_well_deviation": float((outer - known.beyond) / outer_error),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000, help="of the optimizer")
    main(parser.parse_args().steps)

"""Exact likelihoods of particles beside a trace by products inside the ODE, and what one probe does to their weights.

What tbg and bgflow do is written out here: their ODE carries the log-density along, and sums the diagonal of the Jacobian
by one product after another, or takes one fixed Rademacher probe. Network, tolerance and samples are those of ours.
"""

import functools
import math

import torch
from results_trained import Ours, Trained
from timing import medians
from torch import Generator, Tensor
from torchdiffeq import odeint

from divflow.data import Particles
from divflow.flow import ContinuousFlow

# Entries of the test rows whose likelihoods are timed; samples of the flow that are weighted.
ENTRIES, SAMPLES = 800, 2_000


@torch.no_grad()
def particles(trained: Trained) -> dict[str, float]:
    """Seconds of 10,000 exact likelihoods by both ways; what weights by exact densities and by one probe say of log Z.

    Of ours alone, whose test has said the same of more samples.
    """
    if not isinstance(trained, Ours):
        return {}
    density, data = trained.model, trained.data
    flow = density.flow
    assert isinstance(data, Particles)
    x = density.transform(data.test.rows[: ENTRIES // math.prod(data.event_shape)])[0].to(density.dtype)
    start, end = flow.times()

    def by_products() -> Tensor:
        z, log_det = augmented(flow, x, end, start, None)
        return flow.base.log_prob(z) + log_det

    seconds = medians({"exact": functools.partial(flow.log_prob, x), "by products": by_products}, 60.0)
    metrics = {
        "likelihoods_seconds": 10_000 / len(x) * seconds["exact"],
        "brute_force_seconds": 10_000 / len(x) * seconds["by products"],
        "likelihoods_difference": (flow.log_prob(x) - by_products()).abs().mean().item(),
    }
    z = flow.base.sample(SAMPLES, Generator().manual_seed(1))
    probe = torch.randint(0, 2, z.shape, generator=Generator().manual_seed(2)) * 2.0 - 1
    y, log_det = augmented(flow, z, start, end, probe)
    samples = density.transform.inverse(y)
    log_target = -data.energy(samples) - density.transform(samples)[1]
    exact = torch.cat([flow.log_prob(part) for part in y.split(data.eval_batch_size)])
    for name, log_prob in (("exact", exact), ("one_probe", flow.base.log_prob(z) - log_det)):
        log_weights = (log_target - log_prob).double()
        size = (2 * log_weights.logsumexp(dim=0) - (2 * log_weights).logsumexp(dim=0)).exp().item()
        total = log_weights.logsumexp(dim=0).item() - math.log(SAMPLES)
        metrics[f"{name}_log_normalizer"] = total - data.log_normalizer
        metrics[f"{name}_log_normalizer_standard_error"] = math.sqrt((SAMPLES / size - 1) / (SAMPLES - 1))
    return metrics


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
    tolerance = {"rtol": flow.solver.rtol, "atol": flow.solver.atol}
    states, log_dets = odeint(dynamics, (x, torch.zeros(len(x))), times, method="dopri5", **tolerance)
    return states[-1], log_dets[-1]

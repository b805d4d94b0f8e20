"""log p of a model of flow_matching, by its own exact solver and by divflow's adapter: python tests/benchmarks/adapters.py

The same model, data, method and tolerance; both exact. Needs flow_matching 1.0.10.
"""

import argparse
from collections.abc import Callable

import torch
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from timing import medians
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from divflow.adapters import from_flow_matching
from divflow.likelihood import Quadrature
from divflow.solver import Solver

DIMENSIONS = [2, 16, 64]


class Velocity(ModelWrapper):
    """A network of two hidden layers that carries a normal density to one that is not, at random."""

    def __init__(self, size: int, hidden: int) -> None:
        layers = nn.Linear(size + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size)
        super().__init__(nn.Sequential(*layers))
        for layer in layers[::2]:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(layers[-1].weight, std=2 * hidden**-0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity; t is a scalar or one time a sample."""
        return self.model(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], dim=1))


def compare(size: int, hidden: int, batch: int, tolerance: float, seconds: float) -> tuple[float, dict[str, float]]:
    """The largest difference of the two in nats, and median milliseconds of each way, by name."""
    model, source = Velocity(size, hidden), Independent(Normal(torch.zeros(size), torch.ones(size)), 1)
    theirs, settings = ODESolver(model), {"method": "dopri5", "atol": tolerance, "rtol": tolerance}
    x = theirs.sample(torch.randn(batch, size), None, **settings)
    flow = from_flow_matching(model, size, solver=Solver(rtol=tolerance, atol=tolerance))
    fixed = flow.replace(likelihood=Quadrature(15))
    ways: dict[str, Callable[[], Tensor]] = {
        "divflow, ms": torch.no_grad()(lambda: flow.log_prob(x)),
        "with 15 nodes, ms": torch.no_grad()(lambda: fixed.log_prob(x)),
        "flow_matching, ms": lambda: theirs.compute_likelihood(
            x.clone(), source.log_prob, None, **settings, exact_divergence=True
        )[1],
        "one solve without divergence, ms": torch.no_grad()(lambda: flow.encode(x)),
    }
    difference = (ways["divflow, ms"]() - ways["flow_matching, ms"]()).abs().max().item()
    return difference, {name: 1e3 * time for name, time in medians(ways, seconds).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=128, help="units of each of the two hidden layers")
    parser.add_argument("--batch", type=int, default=256, help="samples")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of dopri5, relative and absolute")
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on each row, at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, H = {arguments.hidden}, batch {arguments.batch}\n")
    for size in DIMENSIONS:
        difference, times = compare(size, arguments.hidden, arguments.batch, arguments.tolerance, arguments.seconds)
        if size == DIMENSIONS[0]:
            print(
                f"| D | largest difference, nats | {' | '.join(times)} | times faster |\n|{'---|' * (len(times) + 3)}"
            )
        row = [str(size), f"{difference:.1e}", *(f"{time:.0f}" for time in times.values())]
        print("|", " | ".join(row), f"| **{times['flow_matching, ms'] / times['divflow, ms']:.1f}** |", flush=True)


if __name__ == "__main__":
    main()

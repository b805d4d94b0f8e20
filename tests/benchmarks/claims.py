"""How often the error that a flow states bounds the true one, over random networks; `python tests/benchmarks/claims.py`.

For each tolerance: the share of samples whose error is within the claim, the median and the largest ratio of error to claim,
the share of networks where any sample's was larger, and the evaluations in the solve, at nodes, and for the errors.
"""

import argparse
import itertools
import math

import torch
from torch import nn

from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Solver

_ACTIVATIONS = (nn.Tanh, nn.SiLU, nn.Softplus, nn.GELU)
_ROWS = 8


class RandomVelocity(nn.Module):
    """A network of t, its sine and cosine, and x; as steep, as deep and as fast in time as chance will have it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def choice(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=draw))

        self.dimension, width, depth = choice(1, 9), 2 ** choice(3, 7), choice(1, 4)
        activation = _ACTIVATIONS[choice(0, len(_ACTIVATIONS))]
        gain, self.frequency = (
            10 ** float(torch.rand((), generator=draw) * b - a) for a, b in ((0.4, 0.7), (0.0, 1.5))
        )
        sizes = [self.dimension + 3, *[width] * depth, self.dimension]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layer = nn.Linear(inputs, outputs)
            with torch.no_grad():
                layer.weight.copy_(gain * torch.randn(layer.weight.shape, generator=draw) / math.sqrt(inputs))
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=draw) / 2)
            layers += [layer, activation()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        t = t.expand(len(x)).unsqueeze(1)
        return self.net(torch.cat([t, (self.frequency * t).sin(), (self.frequency * t).cos(), x], dim=1))


def random_flow(seed: int) -> tuple[ContinuousFlow, torch.Tensor]:
    """A flow in double precision, and states."""
    velocity = RandomVelocity(seed)
    draw = torch.Generator().manual_seed(seed + 10_000)
    x = 1.5 * torch.randn(_ROWS, velocity.dimension, generator=draw, dtype=torch.float64)
    return ContinuousFlow(velocity, velocity.dimension).double(), x


@torch.no_grad()
def truth(flow: ContinuousFlow, x: torch.Tensor) -> torch.Tensor:
    """log p by the augmented ODE at a tolerance that leaves 1e-9 or so."""
    solver = Solver("dopri8", rtol=1e-10, atol=1e-10, max_evaluations=1_000_000)
    return flow.replace(solver=solver, likelihood=Augmented()).log_prob(x)


@torch.no_grad()
def ratios(
    networks: int, tolerance: float | None, solver: Solver, dtype: torch.dtype
) -> tuple[torch.Tensor, list[int]]:
    """The error of log p over its claim, `(networks, rows)`, and the mean numbers of evaluations."""
    rows, counts = [], []
    for seed in range(networks):
        flow, x = random_flow(seed)
        true = _TRUTHS[seed] if seed in _TRUTHS else _TRUTHS.setdefault(seed, truth(flow, x))
        result = flow.replace(likelihood=Quadrature(tolerance=tolerance), solver=solver).to(dtype).evaluate(x.to(dtype))
        assert result.quadrature_error is not None
        rows.append((result.log_prob.double() - true).abs() / result.quadrature_error.double().clamp_min(1e-300))
        used = result.evaluations
        counts.append([used.forward, used.divergence, getattr(used, "diagnostics", 0)])
    return torch.stack(rows), torch.tensor(counts, dtype=torch.float64).mean(dim=0).round().int().tolist()


_TRUTHS: dict[int, torch.Tensor] = {}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--single", action="store_true", help="in single precision")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.single else torch.float64
    torch.set_num_threads(1)
    print("tolerance  solver  within the claim  median ratio  largest  networks with any beyond  evaluations")
    for solver in (1e-5, 1e-3):
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, None):
            ratio, counts = ratios(arguments.networks, tolerance, Solver(rtol=solver, atol=solver), dtype)
            within = (ratio <= 1).double().mean()
            beyond = (ratio > 1).any(dim=1).double().mean()
            name = "15 nodes" if tolerance is None else f"{tolerance:g}"
            print(
                f"{name:9}  {solver:6g}  {within:16.1%}  {ratio.median():12.2g}  {ratio.max():7.2g}  {beyond:24.1%}  {counts}",
                flush=True,
            )


if __name__ == "__main__":
    main()

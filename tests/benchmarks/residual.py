"""A training step of the Fokker-Planck equation in ten dimensions (examples/fokker_planck.py), against torch.func."""

import torch
from fokker_planck import DIMENSIONS, LAST, Network, Problem, residual, residual_by_torch_func
from timing import medians

Row = tuple[str, str, str, str]


def steps() -> list[Row]:
    """Loss and gradient in the parameters, a batch of 256."""
    problem = Problem()
    network, t = Network(problem), LAST * torch.rand(256, 1)
    x = problem.sample(t)
    ways = {"divflow": residual, "torch.func": residual_by_torch_func}

    def step(way: str) -> None:
        network.zero_grad()
        ways[way](problem, network, t, x).square().mean().backward()

    time = medians({way: lambda way=way: step(way) for way in ways}, 10.0)
    found = f"**{time['torch.func'] / time['divflow']:.1f}** ({1e3 * time['divflow']:.1f} against {1e3 * time['torch.func']:.1f} ms)"
    what = f"training step of a Fokker-Planck residual, D = {DIMENSIONS}, two hidden layers of 128, batch 256"
    return [(what, "torch.func's Hessian and Jacobian", "", found)]

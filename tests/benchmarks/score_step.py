"""Score matching: time of a training step for each objective, and how much its draws make the gradient vary."""

import itertools
from collections.abc import Callable

import torch
from exact import Row
from timing import medians
from torch import Tensor, nn

from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    Objective,
    SlicedScoreMatching,
)

HIDDEN, BATCH = 256, 256
ASKED = {16: 8, 64: 30}
OBJECTIVES: dict[str, Objective] = {
    "implicit, exact": ImplicitScoreMatching(),
    "sliced": SlicedScoreMatching(),
    "sliced, variance reduction": SlicedScoreMatching(variance_reduction=True),
    "finite differences": FiniteDifferenceScoreMatching(variance_reduction=True),
    "denoising, sigma = 0.1": DenoisingScoreMatching(0.1),
}


def steps() -> list[Row]:
    """A step of Adam with two hidden layers of 256: exact against the loop, and against the other objectives."""
    rows = []
    for batch, size in itertools.product((256, 1024), ASKED):
        net, x = _network(size), torch.randn(batch, size)
        step = _step(net)
        ways = {"loop": lambda net=net, x=x, step=step: step(double_backward_loop(net, x))}
        for name, objective in OBJECTIVES.items():
            ways[name] = lambda net=net, x=x, step=step, o=objective: step(o(net, x))
        time = medians(ways)
        exact = time["implicit, exact"]
        what = f"training step of exact implicit score matching, D = {size}, batch {batch}"
        found = f"**{time['loop'] / exact:.1f}** ({1e3 * exact:.1f} / {1e3 * time['loop']:.0f} ms)"
        rows.append((what, "a loop of double backward", f"{ASKED[size]} times faster", found))
        rows.append(
            (what, "sliced, one slice", "at most 1.5 times", f"**{exact / time['sliced']:.2f}** times its time")
        )
        rows += [
            (
                f"training step, {name}, D = {size}, batch {batch}",
                "exact implicit",
                "",
                f"{time[name] / exact:.2f} times",
            )
            for name in OBJECTIVES
            if name != "implicit, exact"
        ]
    return rows


def gradient_noise() -> list[Row]:
    """The gradient's standard deviation over what an objective draws, relative to the gradient's norm, D = 16.

    At fixed data: a batch of 256 from a normal density, and a network that is half trained.
    """
    torch.manual_seed(0)
    net = _network(16)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        ImplicitScoreMatching()(net, torch.randn(BATCH, 16)).mean().backward()
        optimizer.step()
    x = torch.randn(BATCH, 16)
    exact = _gradient(ImplicitScoreMatching(), net, x).norm()
    rows = []
    for name, objective in OBJECTIVES.items():
        draws = torch.stack([_gradient(objective, net, x) for _ in range(200)])
        noise = draws.var(dim=0).sum().sqrt() / exact
        rows.append((f"noise of the gradient, {name}, D = 16", "the exact gradient's norm", "", f"{noise:.2f} times"))
    return rows


def double_backward_loop(net: nn.Module, x: Tensor) -> Tensor:
    """The trace by one `autograd.grad` a dimension, and the norm: implicit score matching as it is commonly written."""
    x = x.detach().requires_grad_()
    score = net(x)
    trace = torch.zeros(len(x))
    for i in range(x.shape[1]):
        trace = trace + torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i]
    return trace + score.square().sum(dim=1) / 2


def _step(net: nn.Module) -> Callable[[Tensor], None]:
    # The fused Adam: the plain one takes as long as the whole forward and backward pass of a small network.
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def step(losses: Tensor) -> None:
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return step


def _network(size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, size)
    )


def _gradient(objective: Objective, net: nn.Module, x: Tensor) -> Tensor:
    net.zero_grad()
    objective(net, x).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

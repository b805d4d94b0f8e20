"""One training step beside zuko's, on the same network, tolerance and batch, in one run.

A fresh network is close to the zero field, which an adaptive solver crosses in one step; a trained one is what most
steps of a training see.
"""

import functools
from collections.abc import Callable

import torch
import zuko
from timing import medians
from torch import Tensor
from torch.distributions import Independent, Normal

from divflow.divergence import Exact, Hutchinson
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.networks import MLP
from divflow.solver import Solver

SIZES = [(2, 64, 512), (16, 128, 256), (43, 256, 256)]
TARGETS = dict(zip(SIZES, (1.6, 7, 25), strict=True))
TOLERANCE = 1e-5
LOOSE = 0.5  # nats, for every sample: what configs train with

Row = tuple[str, str, str, str]


def _divflow(estimator: object, likelihood: object) -> Callable[[MLP, int], Callable[[Tensor], Tensor]]:
    def make(network: MLP, features: int) -> Callable[[Tensor], Tensor]:
        solver = Solver("dopri5", TOLERANCE, TOLERANCE)
        return ContinuousFlow(network, features, estimator=estimator, likelihood=likelihood, solver=solver).log_prob

    return make


def _zuko(exact: bool) -> Callable[[MLP, int], Callable[[Tensor], Tensor]]:
    def make(network: MLP, features: int) -> Callable[[Tensor], Tensor]:
        transforms = zuko.transforms
        base = Independent(Normal(torch.zeros(features), torch.ones(features)), 1)

        def log_prob(x: Tensor) -> Tensor:
            transform = transforms.FreeFormJacobianTransform(
                network, 1.0, 0.0, tuple(network.parameters()), TOLERANCE, TOLERANCE, exact
            )
            z, log_det = transform.call_and_ladj(x)
            return base.log_prob(z) + log_det

        return log_prob

    return make


WAYS = {
    "divflow exact": _divflow(Exact(), Quadrature()),
    "divflow exact, augmented": _divflow(Exact(), Augmented()),
    "zuko exact": _zuko(exact=True),
    "divflow one probe a node": _divflow(Hutchinson(), Quadrature()),
    "zuko one probe": _zuko(exact=False),
}


@functools.cache
def _network_and_batch(size: tuple[int, int, int], trained: bool) -> tuple[MLP, Tensor]:
    """A network, fresh or after 150 steps towards a mixture of four narrow Gaussians, and a batch of that mixture."""
    features, hidden, batch = size
    torch.manual_seed(0)
    network, means = MLP(features, (hidden, hidden)), 2 * torch.randn(4, features)

    def draw() -> Tensor:
        return means[torch.randint(4, (batch,))] + 0.3 * torch.randn(batch, features)

    if trained:
        solver = Solver("rk4", options={"step_size": 0.25})
        flow = ContinuousFlow(network, features, estimator=Hutchinson(), likelihood=Quadrature(7), solver=solver)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            (-flow.log_prob(draw()).mean()).backward()
            optimizer.step()
    return network, draw()


def steps() -> list[Row]:
    """Every size, fresh and trained, every way in turn."""
    rows = []
    for trained in (True, False):
        for size in SIZES:
            network, x = _network_and_batch(size, trained)

            def step(way: str, network: MLP = network, x: Tensor = x) -> None:
                network.zero_grad()
                (-WAYS[way](network, x.shape[1])(x).mean()).backward()

            time = medians({way: functools.partial(step, way) for way in WAYS}, 25.0)
            state = "trained" if trained else "fresh"
            listed = ", ".join(f"{way} {1e3 * seconds:.0f}" for way, seconds in time.items())
            what = f"training step, {state} network, (D, H, batch) = {size}"
            ratio = time["zuko exact"] / time["divflow exact"]
            rows.append((what, "zuko exact", f"{TARGETS[size]} times faster", f"**{ratio:.1f}** (ms: {listed})"))
            if size[0] == 43:
                ratio = time["zuko one probe"] / time["divflow exact"]
                rows.append((what, "zuko's one-probe estimate", "not slower", f"**{ratio:.1f}** times faster"))
    return rows


def nested() -> list[Row]:
    """As many nodes as a loose tolerance takes, against fifteen."""
    rows = []
    for trained in (True, False):
        for size in SIZES:
            network, x = _network_and_batch(size, trained)
            solver = Solver("dopri5", TOLERANCE, TOLERANCE)
            fixed = ContinuousFlow(network, size[0], likelihood=Quadrature(15), solver=solver)
            flow = fixed.replace(likelihood=Quadrature(tolerance=LOOSE))

            def step(flow: ContinuousFlow, network: MLP = network, x: Tensor = x) -> None:
                network.zero_grad()
                (-flow.log_prob(x).mean()).backward()

            time = medians({"fixed": functools.partial(step, fixed), "nested": functools.partial(step, flow)}, 15.0)
            state = "trained" if trained else "fresh"
            nodes, ratio = flow.evaluate(x).evaluations.divergence, time["nested"] / time["fixed"]
            what = f"training step with a tolerance of {LOOSE} nats, {state} network, (D, H, batch) = {size}"
            rows.append((what, "15 fixed nodes", "0.65 of the time", f"**{ratio:.2f}** ({nodes} nodes)"))
    return rows

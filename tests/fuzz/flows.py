"""Generated calls of flows, compared with an augmented ODE that scipy solves in float64 with brute-force divergences."""

import copy
import random

import numpy as np
import torch
from fuzz.calls import compare
from fuzz.outcomes import Fault, Outcome, is_typed, limit
from fuzz.reference import brute_force, quadratic_forms
from fuzz.world import Generated
from scipy.integrate import solve_ivp
from torch import Generator, Tensor, nn

from divflow.divergence import Autograd, Exact, Hutchinson
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.solver import Solver

__all__ = ["flows"]

_SMOOTH = ["linear", "wide", "tanh", "silu", "softmax", "time gate", "time matrix", "permute", "index select", "gather",
           "attention", "logsumexp", "norm", "cumsum", "mean", "glu", "square", "cat bool", "in place", "custom gate", "energy"]  # fmt: skip
_EVENTS = [(), (1,), (2,), (3,), (2, 2), (1, 2, 2)]


class _Velocity(nn.Module):
    """A mild, smooth velocity, with a context or without."""

    def __init__(self, kinds: list[str], event: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.net = Generated(kinds, event, (max(1, torch.Size(event).numel()),), seed)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0.0 if context is None else context.reshape(-1, *[1] * (x.ndim - 1))
        return 0.4 * self.net(t, x + shift)


def flows(seed: int) -> list[Outcome]:
    """Two calls of one flow."""
    draw, noise = random.Random(seed), Generator().manual_seed(seed)
    event = draw.choice(_EVENTS)
    kinds = draw.choices(_SMOOTH, k=draw.choice([1, 1, 2]))
    dtype = draw.choice([torch.float64, torch.float64, torch.float32])
    velocity = _Velocity(kinds, event, seed).to(dtype)
    gradient = draw.choice(["direct", "direct", "adjoint"])
    method, options = draw.choice([("dopri5", None), ("dopri8", None), ("rk4", {"step_size": 1 / 64}), ("bosh3", None)])
    tolerance = 1e-8 if dtype == torch.float64 else 1e-6
    if method == "bosh3":
        tolerance *= 10
    exact = [Exact(), Exact(chunk_size=1), Exact("forward"), Autograd()]
    estimator = draw.choice([*exact, Hutchinson(2), Hutchinson(1, "sphere")])
    # A refinement draws probes of its own, and more of them than a reference could follow.
    refined = [] if estimator.stochastic else [Quadrature(tolerance=1e-3)]
    flow = ContinuousFlow(
        velocity,
        event,
        estimator=estimator,
        likelihood=draw.choice([Quadrature(), Quadrature(21), *refined, Augmented()]),
        solver=Solver(method, tolerance, tolerance, gradient, options, 3000),
        t_base=draw.choice([0.0, 1.0, torch.tensor(0.2), 2]),
        t_data=draw.choice([0.5, -0.25, torch.tensor(0.7)]),
    ).to(dtype)  # fmt: skip
    outcomes = []
    for _ in range(2):
        batch = draw.choice([0, 1, 2, 3])
        x = torch.randn(batch, *event, generator=noise, dtype=torch.float64).to(dtype)
        context = torch.randn(batch, 1, generator=noise, dtype=torch.float64).to(dtype) if seed % 3 == 0 else None
        if x.numel() and draw.random() < 0.1:
            x.view(-1)[0] = draw.choice([float("nan"), float("inf")])
        with limit(60):
            outcomes.append(_call(flow, x, context, kinds, draw, seed))
    return outcomes


def _call(
    flow: ContinuousFlow, x: Tensor, context: Tensor | None, kinds: list[str], draw: random.Random, seed: int
) -> Outcome:
    what = draw.choice(["log_prob", "evaluate", "decode", "encode", "rsample"])
    mode = draw.choice([torch.enable_grad, torch.no_grad, torch.inference_mode])
    about = f"seed {seed}, {what}, {mode.__name__}, {kinds}, {tuple(x.shape)}, {x.dtype}, {flow.extra_repr()}, x {x.tolist()}"
    start, end = (flow.t_base, flow.t_data) if what in ("decode", "rsample") else (flow.t_data, flow.t_base)
    start, end = float(start), float(end)
    twin = copy.deepcopy(flow.velocity).double()
    state = torch.get_rng_state()
    generator = Generator().manual_seed(seed)
    error = log_prob = None
    try:
        with mode():
            if what in ("decode", "encode"):
                carried = getattr(flow, what)(x, context)
            elif what == "evaluate":
                result = flow.evaluate(x, context, generator)
                carried, log_prob = result.latent, result.log_prob
            elif what == "log_prob":
                carried, log_prob = None, flow.log_prob(x, context, generator)
            else:
                carried, log_prob = flow.rsample_and_log_prob(len(x), context, generator)
    except Exception as caught:
        error = caught
    if error is not None:
        if is_typed(error):
            return Outcome.TYPED
        raise error if isinstance(error, Fault) else Fault(f"{error!r}: {about}", Outcome.OTHER) from error
    if not x.isfinite().all() and what != "rsample":
        if (what in ("decode", "encode") and not carried.isfinite().all()) or (
            log_prob is not None and not log_prob.isfinite().all()
        ):
            return Outcome.EQUAL
        raise Fault(f"a finite number from {x.tolist()}: {about}")
    generator = Generator().manual_seed(seed)
    if what == "rsample":
        x = flow.base.sample(len(x), generator)
    torch.set_rng_state(state)
    expected, log_det, size = _reference(flow, twin, x.double(), context, start, end, generator, log_prob is not None)
    tolerance = (1e-5 if x.dtype == torch.float64 else 3e-3) * size**2
    if carried is not None:
        compare("the state", carried, expected, tolerance, about)
    if log_prob is not None:
        z, data = (x.double(), -log_det) if what == "rsample" else (expected, log_det)
        z = z.reshape(len(z), max(1, z[:1].numel()) if len(z) else 1)
        base = -(z.square() + np.log(2 * np.pi)).sum(1) / 2
        # The estimate of a Quadrature's error covers what is left where the integrand is not smooth.
        compare(
            "log_prob",
            log_prob,
            base + data,
            tolerance * (1 + max(1, x[:1].numel())) + _error(flow, x if what != "rsample" else carried, context),
            about,
        )
    return Outcome.EQUAL


def _error(flow: ContinuousFlow, x: Tensor, context: Tensor | None) -> Tensor | float:
    if not isinstance(flow.likelihood, Quadrature) or flow.estimator.stochastic or not len(x):
        return 0.0
    try:
        with torch.no_grad():
            return flow.evaluate(x.detach(), context).quadrature_error.double()
    except DivflowError:
        return 0.0


def _reference(flow, twin, x, context, start, end, generator, log_det):
    """The state at the end, the log-determinant along the same probes, and the size of everything on the way."""
    batch, event, size = len(x), x.shape[1:], 1.0
    count = x.numel()
    if not count:
        return x, x.new_zeros(batch), size
    context = None if context is None else context.double()
    quadrature, sampled = isinstance(flow.likelihood, Quadrature), flow.estimator.stochastic and log_det
    like = x.to(next(flow.velocity.parameters()).dtype)
    nodes = (flow.likelihood.nodes or 15) if quadrature else 0
    probes = None
    if sampled and not quadrature:
        probes = flow.estimator.freeze(like, generator).probes.double()

    def field(t, z):
        return twin(t, z) if context is None else twin(t, z, context)

    def derivative(t, flat):
        z = torch.from_numpy(flat[:count]).reshape(batch, *event)
        time = torch.tensor(t, dtype=torch.float64)
        if not log_det or (sampled and quadrature):
            with torch.no_grad():
                return np.concatenate([field(time, z).reshape(-1).numpy(), np.zeros(batch)])
        here = brute_force(field, time, z)
        trace = here.divergence if probes is None else quadratic_forms(here.jacobian, probes)
        return np.concatenate([here.value.detach().reshape(-1).numpy(), trace.detach().numpy()])

    begin = np.concatenate([x.detach().reshape(-1).numpy(), np.zeros(batch)])
    solution = solve_ivp(
        derivative, (start, end), begin, "DOP853", rtol=1e-8, atol=1e-9, dense_output=sampled and quadrature
    )
    final = torch.from_numpy(solution.y[:, -1])
    size += float(np.abs(solution.y).max())
    carried, log_dets = final[:count].reshape(batch, *event), final[count:]
    if sampled and quadrature:
        drawn = flow.estimator.along(like, [1] * nodes, generator)
        rule, log_dets = gauss_kronrod(nodes), torch.zeros(batch, dtype=torch.float64)
        for node, weight, probe in zip(rule.nodes, rule.kronrod_weights, drawn, strict=True):
            t = start + (end - start) * float(node)
            z = torch.from_numpy(solution.sol(t)[:count]).reshape(batch, *event)
            jacobian = brute_force(field, torch.tensor(t, dtype=torch.float64), z).jacobian
            log_dets += (end - start) * float(weight) * quadratic_forms(jacobian, probe.probes).detach()
    return carried, log_dets, size

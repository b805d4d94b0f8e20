"""How often a stated standard error is right: the share of repeats whose error is within two of it, 95 % for a normal one.

Estimates of independent rows of a batch are independent, so that a batch is as many repeats.
"""

import torch
from catalogue import Network
from closed_forms import LinearVelocity, carried_normal
from torch import Generator, Tensor
from torch.distributions import MultivariateNormal

from divflow.divergence import Autograd, ControlVariate, Estimator, Exact, Hutchinson, HutchPlusPlus, XTrace
from divflow.flow import ContinuousFlow
from divflow.likelihood import Quadrature
from divflow.solver import Solver

SIZE, DISTINCT, REPEATS = 32, 20, 500

ESTIMATORS: dict[str, Estimator] = {
    **{f"Hutchinson({m}, {d!r})": Hutchinson(m, d) for d in ("rademacher", "gaussian", "sphere") for m in (2, 4, 16)},
    **{f"HutchPlusPlus({m})": HutchPlusPlus(m) for m in (5, 9, 24)},
    **{f"XTrace({m})": XTrace(m) for m in (4, 8, 16, 28)},
}
for name, wrapped in {
    "Hutchinson(4)": Hutchinson(4),
    "HutchPlusPlus(9)": HutchPlusPlus(9),
    "XTrace(8)": XTrace(8),
}.items():
    for references in (8, torch.randn(8, SIZE, generator=Generator().manual_seed(2), dtype=torch.float64)):
        for rank in (None, 4):
            kind = "of the batch" if isinstance(references, int) else "given"
            label = f"ControlVariate({name}), {kind}" + ("" if rank is None else f", rank {rank}")
            ESTIMATORS[label] = ControlVariate(wrapped, references, rank)


def fields() -> dict:
    """Jacobians of several kinds: a network's, flat, random, decaying and symmetric, of low rank with noise, diagonal."""
    generator = Generator().manual_seed(0)
    noise, other = (torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    basis, index = torch.linalg.qr(noise).Q, torch.arange(SIZE, dtype=torch.float64)
    matrices = {
        "identity and noise": torch.eye(SIZE, dtype=torch.float64) + 0.00625 * noise,
        "random": noise / SIZE**0.5,
        "symmetric, decaying": (basis * 0.9**index) @ basis.T,
        "general, decaying": (basis * 0.7**index) @ torch.linalg.qr(other).Q,
        "low rank and noise": noise[:, :3] @ other[:3] / 8 + 0.1 * other / SIZE**0.5,
    }
    torch.manual_seed(0)
    network = Network((SIZE,))
    return {"network": lambda t, x: network(t, 2 * x)} | {
        name: (lambda t, x, matrix=matrix: x @ matrix.T) for name, matrix in matrices.items()
    }


def share(value: Tensor, truth: Tensor, error: Tensor) -> float:
    """Of those within two standard errors; rounding is no error."""
    return ((value - truth).abs() <= 2 * error + 1e-12 * truth.abs()).double().mean().item()


@torch.no_grad()
def of_divergence(estimator: Estimator, field, repeats: int = REPEATS, seed: int = 1) -> float:
    """The coverage of an estimator's error."""
    x = torch.randn(DISTINCT, SIZE, generator=Generator().manual_seed(0), dtype=torch.float64).repeat(
        repeats // DISTINCT, 1
    )
    found = estimator.estimate(field, 0.3, x, Generator().manual_seed(seed))
    assert found.standard_error is not None
    return share(found.divergence, Autograd()(field, 0.3, x).divergence, found.standard_error)


def linear_flow(size: int = 12) -> tuple[ContinuousFlow, MultivariateNormal]:
    """A flow whose density is known."""
    velocity = LinearVelocity((size,))
    solver = Solver("rk4", options={"step_size": 1 / 8})
    flow = ContinuousFlow(velocity, size, solver=solver, likelihood=Quadrature(7)).double()
    flow.velocity.A.data.mul_(0.5)
    return flow, carried_normal(velocity, 0.0, 1.0)


LOG_PROBS: dict[str, Estimator] = {
    "Hutchinson(2)": Hutchinson(2),
    "Hutchinson(8)": Hutchinson(8),
    "Hutchinson(4, 'gaussian')": Hutchinson(4, "gaussian"),
    "HutchPlusPlus(6)": HutchPlusPlus(6),
    "XTrace(4)": XTrace(4),
    "XTrace(8)": XTrace(8),
    "ControlVariate(Hutchinson(4)), of the batch": ControlVariate(Hutchinson(4), 8),
}


@torch.no_grad()
def of_log_prob(estimator: Estimator, frozen: bool = False, repeats: int = REPEATS) -> float:
    """The coverage of the error of log p; a control variate needs Jacobians that differ, which a network's do."""
    flow, _ = linear_flow()
    if isinstance(estimator, ControlVariate):
        torch.manual_seed(0)
        network = Network((12,))
        flow = ContinuousFlow(
            lambda t, x: network(t, 2 * x), 12, solver=flow.solver, likelihood=flow.likelihood
        ).double()
    x = torch.randn(DISTINCT, 12, generator=Generator().manual_seed(0), dtype=torch.float64).repeat(
        repeats // DISTINCT, 1
    )
    drawn = estimator.freeze(x, Generator().manual_seed(1)) if frozen else estimator
    found = flow.replace(estimator=drawn).evaluate(x, generator=Generator().manual_seed(1), diagnostics=False)
    assert found.standard_error is not None
    exact = flow.replace(estimator=Exact()).log_prob(x)
    return share(found.log_prob, exact, found.standard_error)


WEIGHTS: dict[str, Estimator] = {
    "Exact()": Exact(),
    "Hutchinson(2), corrected": Hutchinson(2),
    "Hutchinson(8), corrected": Hutchinson(8),
    "HutchPlusPlus(9), corrected": HutchPlusPlus(9),
    "XTrace(8), corrected": XTrace(8),
}


@torch.no_grad()
def of_log_normalizer(estimator: Estimator, repeats: int = REPEATS, samples: int = 200) -> float:
    """The coverage of the error of log Z, by a target that is a little off."""
    flow, truth = linear_flow()
    flow = flow.replace(estimator=estimator)
    target = MultivariateNormal(truth.loc + 0.1, 0.95 * truth.covariance_matrix)
    runs = [
        flow.importance_weights(lambda x: target.log_prob(x) + 3, samples, Generator().manual_seed(i), correct=True)
        for i in range(repeats)
    ]
    value, error = (torch.stack([getattr(run, name) for run in runs]) for name in ("log_normalizer", "standard_error"))
    return share(value, torch.full_like(value, 3.0), error)

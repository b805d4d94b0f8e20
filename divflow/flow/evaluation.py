"""What a flow answers: the log-density of samples, with everything that is known of it."""

from typing import NamedTuple, Protocol

import torch
from torch import Generator, Size, Tensor

from divflow.distributions import BaseDensity
from divflow.divergence import Estimator
from divflow.likelihood import Transport
from divflow.operators.context import Context
from divflow.solver import Evaluations, Solver
from divflow.solver.step_control import METHOD_ORDERS

__all__ = ["Flow", "FlowEvaluation", "trajectory_error"]

# What a change by halved steps is multiplied by, over the geometric series of further halvings.
_SAFETY = 2.0
# Of a solve's and a sum's roundings, what may add up.
_ROUNDINGS = 8.0


class FlowEvaluation(NamedTuple):
    """A log-density with everything that is known of it.

    Attributes:
        log_prob: log p_data(x) = log p_base(latent) + log_det, in nats, `(k,)`.
        latent: the state at t_base, `(k, *event)`.
        log_det: log |det d latent / d x| = -integral from t_base to t_data of div v dt, in nats, `(k,)`.
        quadrature_error: estimated absolute error of log_prob, in nats, `(k,)`; None if not known. It is that of the
            integral at its nodes and, where further evaluations were allowed (`diagnostics`), that of the trajectory.
        standard_error: of log_prob under a stochastic estimator, in nats, `(k,)`: zero if exact, None if not known. From m
            probes it has m - 1 degrees of freedom: two of it hold 71 % of errors with 2 probes, and 93 % with 8.
        evaluations: of the field; `backward` grows when an adjoint gradient is taken.
        penalties: the integrals over time that were asked for, by name, `(k,)`.
        trajectory_error: the part of quadrature_error that the solver's steps have made, `(k,)`: twice what log_prob
            changes by if all of them are halved, and some rounding; infinite where that fails, None if not known.
    """

    log_prob: Tensor
    latent: Tensor
    log_det: Tensor
    quadrature_error: Tensor | None
    standard_error: Tensor | None
    evaluations: Evaluations
    penalties: dict[str, Tensor] = {}
    trajectory_error: Tensor | None = None


class Flow(Protocol):
    """What its distribution and its importance weights ask of a flow: `ContinuousFlow`, whose methods these are."""

    event_shape: Size
    estimator: Estimator

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The log-density of x `(k, *event)` in nats, `(k,)`."""

    def sample_base(self, num_samples: int) -> Tensor:
        """Draws of the base `(num_samples, *event)`."""

    def decode(self, z: Tensor, context: Context | None = None) -> Tensor:
        """The data of latents z `(k, *event)`."""

    def rsample_and_log_prob(self, num_samples: int, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities, from one solve."""

    def rsample_and_evaluate(
        self, num_samples: int, context: Context | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, FlowEvaluation]:
        """Samples and what is known of their log-densities, from one solve."""


@torch.no_grad()
def trajectory_error(base: BaseDensity, solver: Solver, log_base: Tensor, carried: Transport) -> Tensor | None:
    """Of log p, `(k,)`, from that by halved steps; None where these were not taken."""
    if carried.finer is None:
        return None
    order, log_det = METHOD_ORDERS.get(solver.method, 5), carried.log_det.detach()
    after, before = base.log_prob(carried.finer.state), log_base.detach()
    # Of two infinities nothing is left.
    moved = torch.where(after == before, 0.0, after - before) + carried.finer.log_det
    rounding = torch.finfo(before.dtype).eps * (1 + before.abs().nan_to_num(posinf=0.0) + log_det.abs())
    return _SAFETY / (1 - 0.5**order) * moved.abs() + _ROUNDINGS * rounding

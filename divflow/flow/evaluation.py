"""The result of evaluating a flow: the log-density of samples, with its errors and costs."""

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

# Factor on the change by halved steps, for the geometric series of further halvings.
_SAFETY = 2.0
# The rounding of a solve and a sum that may accumulate.
_ROUNDINGS = 8.0


class FlowEvaluation(NamedTuple):
    """A log-density with its latent, errors and counted evaluations.

    Attributes:
        log_prob: log p_data(x) = log p_base(latent) + log_det, in nats, `(k,)`.
        latent: the state at t_base, `(k, *event)`.
        log_det: log |det d latent / d x| = -integral from t_base to t_data of div v dt, in nats, `(k,)`.
        quadrature_error: estimated absolute error of log_prob, in nats, `(k,)`; None if unknown. It is the error of the
            integral at its nodes plus, if further evaluations were allowed (`diagnostics`), that of the trajectory.
        standard_error: of log_prob with a stochastic estimator, in nats, `(k,)`: zero if exact, None if unknown. With m
            probes it has m - 1 degrees of freedom: two of it cover 71 % of errors with 2 probes, and 93 % with 8.
        evaluations: of the field; `backward` grows when an adjoint gradient is taken.
        penalties: the requested integrals over time by name, `(k,)`.
        trajectory_error: the part of quadrature_error from the solver's steps, `(k,)`: twice the change of log_prob if all
            steps are halved, plus some rounding; infinite if that fails, None if unknown.
        off_manifold: how far the solve ended from the flow's manifold before its states were brought back, in units of the largest
            entry, `(k,)`; None without a manifold.
    """

    log_prob: Tensor
    latent: Tensor
    log_det: Tensor
    quadrature_error: Tensor | None
    standard_error: Tensor | None
    evaluations: Evaluations
    penalties: dict[str, Tensor] = {}
    trajectory_error: Tensor | None = None
    off_manifold: Tensor | None = None


class Flow(Protocol):
    """What a distribution and importance weights need of a flow: methods of `ContinuousFlow`."""

    event_shape: Size
    estimator: Estimator

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Compute the log-density of x `(k, *event)` in nats, `(k,)`."""

    def sample_base(self, num_samples: int) -> Tensor:
        """Draw from the base, `(num_samples, *event)`."""

    def decode(self, z: Tensor, context: Context | None = None) -> Tensor:
        """Map latents z `(k, *event)` to data."""

    def rsample_and_log_prob(self, num_samples: int, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Draw samples with their log-densities, from one solve."""

    def rsample_and_evaluate(
        self, num_samples: int, context: Context | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, FlowEvaluation]:
        """Draw samples with a `FlowEvaluation`, from one solve."""


@torch.no_grad()
def trajectory_error(base: BaseDensity, solver: Solver, log_base: Tensor, carried: Transport) -> Tensor | None:
    """Estimate the error of log p from that by halved steps, `(k,)`; None if these were not taken.

    Args:
        base: of the flow.
        solver: of the trajectory.
        log_base: the base's log-density at the latent.
        carried: the transport.
    """
    if carried.finer is None:
        return None
    order, log_det = METHOD_ORDERS.get(solver.method, 5), carried.log_det.detach()
    after, before = base.log_prob(carried.finer.state), log_base.detach()
    # The difference of two infinities is no error.
    moved = torch.where(after == before, 0.0, after - before) + carried.finer.log_det
    rounding = torch.finfo(before.dtype).eps * (1 + before.abs().nan_to_num(posinf=0.0) + log_det.abs())
    return _SAFETY / (1 - 0.5**order) * moved.abs() + _ROUNDINGS * rounding

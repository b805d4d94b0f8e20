"""The protocol of a likelihood: carry states along a field and return the log-determinant of doing so."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import NamedTuple

from torch import Generator, Tensor

from divflow.divergence import Estimator
from divflow.likelihood.conditioned import ConditionedField
from divflow.solver import Evaluations, Solver

__all__ = ["Finer", "Likelihood", "Transport"]


class Finer(NamedTuple):
    """The change of a transport by steps of half the length: how far the solver's errors have moved it.

    Attributes:
        state: x(t_end), `(k, *event)`.
        log_det: minus that of the transport, in nats, `(k,)`; infinite if there is no finer solution.
    """

    state: Tensor
    log_det: Tensor


class Transport(NamedTuple):
    """States carried from t_start to t_end, with the log-determinant and its errors.

    Attributes:
        state: x(t_end), `(k, *event)`.
        log_det: log |det dx(t_end) / dx(t_start)| in nats, `(k,)`.
        quadrature_error: estimated absolute error of the integration of the divergence, in nats, `(k,)`; None if unknown.
        standard_error: of a stochastic estimate, in nats, `(k,)`: zero if the divergence is exact, None if unknown.
        penalties: the requested integrals over time by name, `(k,)`.
        finer: by steps half as long, with the same divergences; None if not requested or unknown.
        off_manifold: how far the state was from a manifold before a flow brought it back, `(k,)`; None without one.
    """

    state: Tensor
    log_det: Tensor
    quadrature_error: Tensor | None
    standard_error: Tensor | None
    penalties: dict[str, Tensor] = {}
    finer: Finer | None = None
    off_manifold: Tensor | None = None


class Likelihood(ABC):
    """Base class of the ways to carry states together with their log-determinant."""

    @abstractmethod
    def transport(
        self,
        field: ConditionedField,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
        *,
        estimator: Estimator,
        solver: Solver,
        evaluations: Evaluations,
        generator: Generator | None = None,
        diagnostics: bool = True,
        penalties: Collection[str] = (),
    ) -> Transport:
        """Carry states from t_start to t_end, either of which may be the later one.

        Args:
            field: the velocity.
            x: states at t_start, `(k, *event)`.
            t_start: a scalar tensor; the result is differentiable in it.
            t_end: likewise.
            estimator: of the divergence.
            solver: of the trajectory.
            evaluations: a counter to add to.
            generator: of the probes, for a stochastic estimator.
            diagnostics: estimate the errors even if that takes further evaluations.
            penalties: names of integrals to take along the trajectory, of `PENALTIES`.
        """

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
    """What steps that are half as long make of a transport: how far the solver's errors have moved it.

    Attributes:
        state: x(t_end), `(k, *event)`.
        log_det: less that of the transport, in nats, `(k,)`; infinite where there is no finer solution.
    """

    state: Tensor
    log_det: Tensor


class Transport(NamedTuple):
    """States carried from t_start to t_end, and what is known of the log-determinant.

    Attributes:
        state: x(t_end), `(k, *event)`.
        log_det: log |det dx(t_end) / dx(t_start)| in nats, `(k,)`.
        quadrature_error: estimated absolute error of the integration of the divergence, in nats, `(k,)`; None
            where it is not known.
        standard_error: of a stochastic estimate, in nats, `(k,)`: zero where the divergence is exact, None where
            it is not known.
        penalties: by name, the integrals over time that were asked for, `(k,)`.
        finer: by steps half as long, with the same divergences; None if not asked for, or not known.
    """

    state: Tensor
    log_det: Tensor
    quadrature_error: Tensor | None
    standard_error: Tensor | None
    penalties: dict[str, Tensor] = {}
    finer: Finer | None = None


class Likelihood(ABC):
    """A way to carry states together with their log-determinant."""

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
        """Carry x `(k, *event)` from t_start to t_end, either of which may be the later one.

        Args:
            field: the velocity.
            x: states at t_start.
            t_start: a scalar tensor; the result is differentiable in it.
            t_end: likewise.
            estimator: of the divergence.
            solver: of the trajectory.
            evaluations: a counter to add to.
            generator: of the probes, for a stochastic estimator.
            diagnostics: estimate the errors even where that takes further evaluations.
            penalties: names of integrals to take along the trajectory, of `PENALTIES`.
        """

"""The classical augmented ODE: state and log-density solved together."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.divergence import Estimator
from divflow.likelihood.conditioned import ConditionedField
from divflow.likelihood.transport import Likelihood, Transport
from divflow.solver import Evaluations, Solver

__all__ = ["Augmented"]


@dataclass(frozen=True)
class Augmented(Likelihood):
    """Compute the log-determinant by the classical augmented ODE, state and log-density solved together.

        d/dt (x, l) = (v, div v)(t, x)    from (x, 0)

    (Chen et al. 2018, equation 8; Grathwohl et al. 2019). `Quadrature` is usually the better choice:

    - The solver's tolerance covers the log-determinant, at the cost of a divergence at each of its evaluations, including
      rejected steps.
    - A stochastic estimator is frozen for the solve, so its errors at all times are correlated and add up. `Quadrature`
      has a far lower variance.

    Use it for comparison, and for `Solver(gradient="adjoint")` on fields whose graph does not fit in memory.

    Example:
        >>> import torch
        >>> from divflow import ContinuousFlow
        >>> flow = ContinuousFlow(lambda t, x: -x, 2, likelihood=Augmented())
        >>> flow.evaluate(torch.zeros(1, 2)).log_det  # of the map from data to base, x = z exp(-1)
        tensor([2.])
    """

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
        """Carry states as `Likelihood.transport`; the error of the integration is unknown, and penalties are refused."""
        if penalties:
            raise ValueError(
                f"Augmented does not integrate penalties, but {list(penalties)} were requested; use Quadrature, which "
                "evaluates them at its nodes"
            )
        frozen = estimator.freeze(x, generator)

        def augmented(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            evaluations.divergence += 1
            value, divergence = frozen(field, t, state[0])
            return value, divergence.to(x.dtype)

        start = (x, x.new_zeros(x.shape[0]))
        states, log_dets = solver.solve(
            augmented,
            start,
            torch.stack([t_start, t_end]),
            evaluations=evaluations,
            parameters=field.differentiable_tensors(),
            size=field.finest_scale,
        )
        exact = None if estimator.estimates else torch.zeros_like(log_dets[-1]).detach()
        return Transport(states[-1], log_dets[-1], None, exact)

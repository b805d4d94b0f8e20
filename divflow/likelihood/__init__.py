"""Integrals of a divergence along a trajectory: the log-determinant of a flow.

log |det dx(t_end) / dx(t_start)| = integral from t_start to t_end of (div v)(t, x_t) dt
"""

from divflow.likelihood.augmented import Augmented
from divflow.likelihood.conditioned import ConditionedField
from divflow.likelihood.penalties import PENALTIES
from divflow.likelihood.quadrature import Quadrature
from divflow.likelihood.transport import Finer, Likelihood, Transport

__all__ = [
    "PENALTIES",
    "Augmented",
    "ConditionedField",
    "Finer",
    "Likelihood",
    "Quadrature",
    "Transport",
]

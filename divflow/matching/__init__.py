"""Flow matching: a flow's velocity is learnt by regression, and its ODE is solved only when it is used.

Noise x_0 at t = 0 and data x_1 at t = 1 are paired by a `Coupling` and joined by a `Path`. The velocity is fitted to
that of the paths at times drawn from a `Times`. It learns their mean, which carries the density of the noise to that of
the data.
"""

from divflow.matching.alignment import EquivariantCoupling
from divflow.matching.coupling import Coupling, IndependentCoupling, OptimalTransportCoupling
from divflow.matching.geodesic import GeodesicPath
from divflow.matching.objective import ConditionalFlowMatching
from divflow.matching.path import AffinePath, LinearPath, Path, PathPoint, TrigonometricPath, VariancePreservingPath
from divflow.matching.times import LogarithmicTimes, LogitNormalTimes, MatchingError, PowerTimes, Times, UniformTimes

__all__ = [
    "AffinePath",
    "ConditionalFlowMatching",
    "Coupling",
    "EquivariantCoupling",
    "GeodesicPath",
    "IndependentCoupling",
    "LinearPath",
    "LogarithmicTimes",
    "LogitNormalTimes",
    "MatchingError",
    "OptimalTransportCoupling",
    "Path",
    "PathPoint",
    "PowerTimes",
    "Times",
    "TrigonometricPath",
    "UniformTimes",
    "VariancePreservingPath",
]

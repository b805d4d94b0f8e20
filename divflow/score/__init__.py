"""Score matching: SDEs, objectives, samplers, and the probability-flow ODE that connects them to likelihoods.

A score is a field s(t, x) that approximates grad_x log p_t(x), with the data at t = 0 and the noise at t = T.
"""

from divflow.score.brownian import BrownianMotion
from divflow.score.data_density import ScoreDensity, UnnormalizedDensity
from divflow.score.probability_flow import ProbabilityFlow, probability_flow
from divflow.score.scaling import ScaledScore
from divflow.score.sde import (
    SDE,
    Marginal,
    SDEError,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)

__all__ = [
    "SDE",
    "BrownianMotion",
    "Marginal",
    "ProbabilityFlow",
    "SDEError",
    "ScaledScore",
    "ScoreDensity",
    "SubVariancePreserving",
    "UnnormalizedDensity",
    "VarianceExploding",
    "VariancePreserving",
    "probability_flow",
]

"""Continuous normalizing flows and what they give: distributions, importance weights, densities of data."""

from divflow.flow.continuous import ContinuousFlow
from divflow.flow.data_density import FlowDensity
from divflow.flow.distribution import FlowDistribution
from divflow.flow.evaluation import FlowEvaluation
from divflow.flow.importance import ImportanceWeights, importance_weights

__all__ = [
    "ContinuousFlow",
    "FlowDensity",
    "FlowDistribution",
    "FlowEvaluation",
    "ImportanceWeights",
    "importance_weights",
]

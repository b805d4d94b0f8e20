"""Score-matching objectives: losses per sample, all on one scale, that agree in expectation up to a constant.

E[loss] = E[|s(t, x) - grad_x log p(x)|^2] / 2 + constant
"""

from divflow.score.objectives.denoising import DenoisingScoreMatching
from divflow.score.objectives.implicit import ImplicitScoreMatching
from divflow.score.objectives.objective import Objective
from divflow.score.objectives.sliced import FiniteDifferenceScoreMatching, SlicedScoreMatching
from divflow.score.objectives.time_conditional import TimeConditionalScoreMatching

__all__ = [
    "DenoisingScoreMatching",
    "FiniteDifferenceScoreMatching",
    "ImplicitScoreMatching",
    "Objective",
    "SlicedScoreMatching",
    "TimeConditionalScoreMatching",
]

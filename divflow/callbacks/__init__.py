"""Lightning callbacks: averaged weights that survive an interruption, figures."""

from divflow.callbacks.averaging import WeightAverage
from divflow.callbacks.figures import Figures

__all__ = ["Figures", "WeightAverage"]

"""Lightning callbacks: averaged weights that survive an interruption, the checkpoint to resume from, figures."""

from divflow.callbacks.averaging import WeightAverage
from divflow.callbacks.figures import Figures
from divflow.callbacks.last import LastCheckpoint
from divflow.callbacks.progress import ProgressBar

__all__ = ["Figures", "LastCheckpoint", "ProgressBar", "WeightAverage"]

"""Lightning callbacks: averaged weights that survive an interruption, checkpoints, processes, figures, progress."""

from divflow.callbacks.averaging import WeightAverage
from divflow.callbacks.best import BestCheckpoint
from divflow.callbacks.figures import Figures
from divflow.callbacks.last import LastCheckpoint
from divflow.callbacks.processes import Processes
from divflow.callbacks.progress import ProgressBar

__all__ = ["BestCheckpoint", "Figures", "LastCheckpoint", "Processes", "ProgressBar", "WeightAverage"]

"""Lightning callbacks: averaged weights that survive an interruption, the checkpoint to resume from, processes, figures."""

from divflow.callbacks.averaging import WeightAverage
from divflow.callbacks.figures import Figures
from divflow.callbacks.last import LastCheckpoint
from divflow.callbacks.processes import Processes

__all__ = ["Figures", "LastCheckpoint", "Processes", "WeightAverage"]

"""Lightning callbacks: averaged weights that survive an interruption, checkpoints, processes, figures, progress."""

import importlib

__all__ = ["BestCheckpoint", "EvaluationTime", "Figures", "LastCheckpoint", "Processes", "ProgressBar", "WeightAverage"]

_ORIGIN = {
    "BestCheckpoint": "best_checkpoint",
    "EvaluationTime": "evaluation_time",
    "Figures": "figures",
    "LastCheckpoint": "last_checkpoint",
    "Processes": "processes",
    "ProgressBar": "progress",
    "WeightAverage": "weight_average",
}


def __getattr__(name: str) -> object:
    """Import on first use: plots alone, as those of `divflow compare`, need no Lightning, whose import takes seconds."""
    if name in _ORIGIN:
        return getattr(importlib.import_module(f"divflow.callbacks.{_ORIGIN[name]}"), name)
    raise AttributeError(f"module 'divflow.callbacks' has no attribute {name!r}; it offers {', '.join(__all__)}")

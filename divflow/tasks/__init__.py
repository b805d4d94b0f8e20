"""LightningModules that train flows and scores: `FlowTask`, `FlowMatchingTask` and `ScoreTask`."""

from divflow.tasks.errors import TaskError, TrainingError
from divflow.tasks.flow_matching import FlowMatchingTask
from divflow.tasks.maximum_likelihood import FlowTask
from divflow.tasks.score_matching import ScoreTask

__all__ = ["FlowMatchingTask", "FlowTask", "ScoreTask", "TaskError", "TrainingError"]

"""The LightningModules."""

from divflow.tasks.flow import FlowTask
from divflow.tasks.score import ScoreTask
from divflow.tasks.task import TrainingError

__all__ = ["FlowTask", "ScoreTask", "TrainingError"]

"""The LightningModules."""

from divflow.tasks.flow import FlowTask
from divflow.tasks.flow_matching import FlowMatchingTask
from divflow.tasks.score import ScoreTask
from divflow.tasks.task import TrainingError

__all__ = ["FlowMatchingTask", "FlowTask", "ScoreTask", "TrainingError"]

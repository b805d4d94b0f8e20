"""Errors of tasks and of training."""

from divflow.errors import DivflowError

__all__ = ["TaskError", "TrainingError"]


class TrainingError(DivflowError, RuntimeError):
    """Training reached a loss or gradient that is not finite, or data that its task can't train on."""


class TaskError(DivflowError, ValueError):
    """A task can't do what was asked of it, such as give the log-density of a score without SDE."""

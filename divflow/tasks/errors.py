"""What can't be done with a task, as an error that says what can."""

from divflow.errors import DivflowError

__all__ = ["TaskError", "TrainingError"]


class TrainingError(DivflowError, RuntimeError):
    """Training left the finite numbers."""


class TaskError(DivflowError, ValueError):
    """A task lacks what is requested, such as the log-density of a score without SDE; the message says what to do."""

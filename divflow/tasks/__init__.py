"""The LightningModules."""

from divflow.tasks.flow import FlowTask

__all__ = ["FlowTask"]

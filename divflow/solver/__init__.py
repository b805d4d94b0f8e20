"""Trajectories of dx/dt = v(t, x) by torchdiffeq, with their gradients and a record of their steps."""

from divflow.solver.failures import SolverError
from divflow.solver.solver import Evaluations, Solver
from divflow.solver.step_control import METHODS

__all__ = ["METHODS", "Evaluations", "Solver", "SolverError"]

"""The exact divergence: which method, and why."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.divergence import dense
from divflow.divergence.estimator import Estimate, Estimator
from divflow.divergence.field import Field, checked_state, event_size

__all__ = ["Exact", "Plan"]

_METHODS = ("auto", "forward", "reverse")


class Plan(NamedTuple):
    """How an exact divergence will be computed.

    Attributes:
        method: the method that `Exact` takes.
        reason: why.
        products: products with the Jacobian, over the whole batch.
        chunk_size: how many of them are taken in one pass.
    """

    method: str
    reason: str
    products: int
    chunk_size: int


@dataclass(frozen=True)
class Exact(Estimator):
    """The exact divergence of any field.

        (div g)_b = sum_i e_i^T J_b e_i

    Args:
        method: "reverse" takes rows of the Jacobian from one evaluation of the field; "forward" takes
            columns (`torch.func.jvp`), for fields with forward-mode rules, evaluating once a pass;
            "auto" takes the cheapest that applies (`explain` says which and why).
        chunk_size: basis vectors a pass; None takes what suits the device. Peak memory grows with it and
            not with D; where it is given, that holds in training too: each chunk is then computed again
            in the backward pass, at about a third more time.

    Raises:
        ValueError: an unknown method, or a chunk size below 1.
    """

    method: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method must be one of {list(_METHODS)}, but is {self.method!r}")
        if self.chunk_size is not None and (self.chunk_size < 1 or int(self.chunk_size) != self.chunk_size):
            raise ValueError(f"chunk_size must be None or a whole number of at least 1, but is {self.chunk_size!r}")

    def explain(self, g: Field, t: Tensor | float, x: Tensor) -> Plan:
        """What a call with these arguments does, and why; the field is not evaluated."""
        size = event_size(checked_state(x))
        chunk_size = min(self.chunk_size or dense.products_per_pass(x), max(size, 1))
        if self.method == "auto":
            reason = "one evaluation of the field serves all products, and no forward-mode rules are needed"
            return Plan("reverse", reason, size, chunk_size)
        return Plan(self.method, "asked for", size, chunk_size)

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the exact divergence and a standard error of zero; `generator` is not used."""
        plan = self.explain(g, t, x)
        if plan.method == "forward":
            value, divergence = dense.forward(g, t, x, plan.chunk_size)
        else:
            value, divergence = dense.reverse(g, t, x, plan.chunk_size, recompute=self.chunk_size is not None)
        return Estimate(value, divergence, torch.zeros_like(divergence, requires_grad=False))

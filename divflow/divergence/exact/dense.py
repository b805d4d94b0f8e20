"""Dense products: rows of the Jacobian, of any field."""

from typing import Any

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.method import Evaluation, Method, Prepared
from divflow.operators import dense
from divflow.operators.plan import Plan

__all__ = ["Dense"]

# How much lighter a value between weighs, in how many products a pass holds, than an entry of x (measured on
# MLPs, where weighing it fully costs a third of the time, and UNets, where not at all doubles it).
_LIGHTER = 8


class Dense(Method):
    """Rows of the Jacobian from one evaluation of the field.

    Args:
        why: the reason.
    """

    name = "reverse"

    def __init__(self, why: str = "asked for") -> None:
        self._why = why

    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared:
        """It serves every field; the plan is what is kept."""
        plan = self.plan(evaluation) if kept is None else kept
        x = evaluation.x

        def take() -> ValueAndDivergence:
            field = evaluation.linearized()
            return ValueAndDivergence(field.value, dense.reverse(field, x, plan.chunk_size, evaluation.recompute))

        return Prepared(lambda: plan, take, plan)

    def plan(self, evaluation: Evaluation) -> Plan:
        """What it costs."""
        size, x, followed = evaluation.size, evaluation.x, evaluation.followed
        # A pass holds the gradients of all values between: where these are large, a few products fill the cache.
        between = 0 if followed is None else followed.tape.elements // max(1, x.numel())
        chunk = evaluation.products_per_pass(size, max(1, between // _LIGHTER))
        cost = 1 + size
        return Plan(self.name, self._why, size, chunk, cost, cost / 2, evaluation.memory(chunk))

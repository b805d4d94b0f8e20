"""Dense products: rows of the Jacobian of any field."""

from typing import Any

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.method import Evaluation, Method, Prepared
from divflow.operators import dense
from divflow.operators.plan import Plan

__all__ = ["Dense"]

# By which factor intermediate values count less than entries of x for the products of a pass. Measured: full weight
# costs MLPs a third of the time, no weight doubles the time of UNets.
_LIGHTER = 8


class Dense(Method):
    """Rows of the Jacobian from one evaluation of the field.

    Args:
        why: the reason for this method.
    """

    name = "reverse"

    def __init__(self, why: str = "asked for") -> None:
        self._why = why

    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared:
        """Prepare any field; the plan is kept."""
        plan = self.plan(evaluation) if kept is None else kept
        x = evaluation.x

        def take() -> ValueAndDivergence:
            field = evaluation.linearized()
            return ValueAndDivergence(field.value, dense.reverse(field, x, plan.chunk_size, evaluation.recompute))

        return Prepared(lambda: plan, take, plan)

    def plan(self, evaluation: Evaluation) -> Plan:
        """Estimate what it costs."""
        size, x, followed = evaluation.size, evaluation.x, evaluation.followed
        # A pass holds the gradients of all intermediate values: if these are large, a few products fill the cache.
        between = 0 if followed is None else followed.tape.elements // max(1, x.numel())
        chunk = evaluation.products_per_pass(size, max(1, between // _LIGHTER))
        cost = 1 + size
        return Plan(self.name, self._why, size, chunk, cost, cost / 2, evaluation.memory(chunk))

"""Colouring: local fields, with normalizations between or without; their colours, what is verified of them, and the divergence."""

from typing import Any

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.colored import colors, held
from divflow.divergence.exact.colored.colors import Coloring, NotLocal
from divflow.divergence.exact.colored.held import Held
from divflow.divergence.exact.followed import Followed
from divflow.divergence.exact.method import Evaluation, Method, Prepared, Refusal
from divflow.operators.plan import Plan
from divflow.tape.written import NORMALIZATIONS
from divflow.verification.kept import Plans

__all__ = ["Colored"]

# Products, for each dimension, up to which colours are worth it.
_WORTH_COLORING = 0.8
# By field, event shape and structure, whatever the batch.
_COLORINGS: Plans[Coloring] = Plans(size=8)


class Colored(Method):
    """One product for all dimensions of a colour, of fields whose entries see few others."""

    name = "colored"

    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared | Refusal:
        """Colour the field, or evaluate it as it was coloured; the plan and the colouring are what is kept."""
        try:
            if kept is None:
                coloring, at = _chosen(evaluation)
                plan = _plan(evaluation, coloring, at)
            else:
                plan, coloring = kept
                at = _evaluated(evaluation, coloring, verify)
        except NotLocal as error:
            return Refusal(f"not colored: {error}")
        followed = evaluation.followed
        assert followed is not None
        field, x, chunk, recompute = followed.field, evaluation.x, plan.chunk_size, evaluation.recompute

        def take() -> ValueAndDivergence:
            if at is None:
                return ValueAndDivergence(field.value, colors.trace(field, x, coloring.colors, chunk, recompute))
            return ValueAndDivergence(field.value, held.trace(at, x, coloring.colors, chunk, recompute))

        return Prepared(lambda: plan, take, (plan, coloring))


def _plan(evaluation: Evaluation, coloring: Coloring, at: Held | None) -> Plan:
    followed = evaluation.followed
    assert followed is not None
    count = len(coloring.colors) + 2 * coloring.statistics
    why = f"{len(coloring.colors)} colours for {coloring.seen.shape[0]} dimensions"
    if at is not None:
        number = at.normalizations
        why += f", and {at.total} statistics of {number} normalization{'s' if number > 1 else ''}"
    if not evaluation.asked and count > _WORTH_COLORING * evaluation.size:
        raise NotLocal(f"it takes {why}")
    # A network of images has far more activations than its states have entries.
    chunk = evaluation.products_per_pass(count, max(1, followed.tape.elements // evaluation.x.numel()))
    cost = 1 + count
    return Plan("colored", f"a local field: {why}", count, chunk, cost, cost / 2, evaluation.memory(chunk))


def _evaluated(evaluation: Evaluation, coloring: Coloring, verify: bool) -> Held | None:
    """Evaluate the field with its normalizations' statistics held, if it is coloured so; verify it on request.

    Raises:
        NotLocal: the field is not what was coloured.
    """
    g, t, x, followed = evaluation.g, evaluation.t, evaluation.x, evaluation.followed
    assert followed is not None
    at = held.hold(g, t, x, evaluation.states, verify) if coloring.statistics else None
    if at is not None and at.total != coloring.statistics:
        raise NotLocal("its statistics differ from those of earlier calls")
    if verify and at is not None:
        held.check(at, followed.field, x)
    if verify:
        colors.check(followed.field if at is None else at.local, x, coloring.seen)
    return at


def _chosen(evaluation: Evaluation) -> tuple[Coloring, Held | None]:
    """Colour a field, or find how it was coloured before.

    Raises:
        NotLocal: it can't be coloured.
    """
    followed, x = evaluation.followed, evaluation.x
    assert followed is not None
    if evaluation.stateful:
        raise NotLocal("the field changes its own state when it is evaluated")
    if followed.hides():
        raise NotLocal("a part of it is hidden from torch functions")
    if followed.tape.choices:
        raise NotLocal(f"{followed.tape.choices[0]} may choose what is seen")
    key = x.shape[1:], x.dtype, x.device, followed.structure
    coloring = _COLORINGS.get(evaluation.g, *key)
    if coloring is not None:
        try:
            return coloring, _evaluated(evaluation, coloring, verify=True)
        except NotLocal:
            pass  # it was another field: find its own
    coloring, at = _found(evaluation, followed)
    _COLORINGS.keep(coloring, evaluation.g, *key)
    return coloring, at


def _found(evaluation: Evaluation, followed: Followed) -> tuple[Coloring, Held | None]:
    g, t, x = evaluation.g, evaluation.t, evaluation.x
    try:
        return colors.find(g, t, x, followed.field), None
    except NotLocal:
        if NORMALIZATIONS.keys().isdisjoint(name for name, *_ in followed.tape.signature):
            raise
    at = held.hold(g, t, x, evaluation.states, verify=True)
    held.check(at, followed.field, x)
    try:
        return colors.find(at.field, t, x, at.local)._replace(statistics=at.total), at
    except NotLocal as error:
        raise NotLocal(f"with its normalizations' statistics held, {error}") from error

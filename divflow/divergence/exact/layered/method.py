"""The layered method of `Exact`: its plan, its verification, and its divergence."""

from typing import Any

import torch
from torch import Tensor

from divflow.divergence.estimator import ValueAndDivergence
from divflow.divergence.exact.followed import Followed
from divflow.divergence.exact.layered import contract
from divflow.divergence.exact.layered.choose import choose, cost
from divflow.divergence.exact.layered.contract import Contraction
from divflow.divergence.exact.layered.cuts import pulled
from divflow.divergence.exact.layered.reader import JacobianReader
from divflow.divergence.exact.method import Evaluation, Method, Prepared, Refusal
from divflow.operators.field import accumulation_dtype, event_size, flatten_event
from divflow.operators.plan import Plan
from divflow.tape import NoRule
from divflow.verification.agreement import require_equal

__all__ = ["Layered", "contraction_of", "divergence_of"]

# Most memory, in bytes, that the method takes by itself.
_LARGEST_MEMORY = 2**31
# The trace is checked by the whole Jacobian of one sample up to so many dimensions; with opaque functions, whose products
# are for all samples, up to so many rows of the batch.
_LARGEST_JACOBIAN, _MOST_ROWS = 2**12, 2**14


class Layered(Method):
    """A closed form for networks of linear maps and elementwise functions."""

    name = "layered"

    def prepare(self, evaluation: Evaluation, kept: Any = None, verify: bool = True) -> Prepared | Refusal:
        """Find how the trace is computed; what is kept for later calls is the plan."""
        followed = evaluation.followed
        assert followed is not None
        try:
            contraction = contraction_of(followed)
            if verify:
                with torch.inference_mode(False):
                    _verify(followed, contraction)
            plan = _plan(evaluation, followed, contraction) if kept is None else kept
        except NoRule as error:
            return Refusal(f"not layered: {error}".rstrip(","))

        def take() -> ValueAndDivergence:
            return ValueAndDivergence(followed.field.value, divergence_of(followed, contraction, evaluation.chunk_size))

        return Prepared(lambda: plan, take, plan, settled=not followed.reader.local)


def contraction_of(followed: Followed) -> Contraction:
    """Find how the trace of the Jacobian is computed.

    Raises:
        NoRule: the Jacobian is not known.
    """
    network = choose(followed.reader.terms(followed.tape, followed.output), followed.reader.batch)
    with torch.inference_mode(False), torch.set_grad_enabled(followed.field.create_graph):
        return contract.contraction(network, event_size(followed.output))


def divergence_of(followed: Followed, contraction: Contraction, chunk_size: int | None) -> Tensor:
    """The exact divergence, `(k,)`."""
    create_graph = followed.field.create_graph
    like = followed.output.new_empty((), dtype=accumulation_dtype(followed.field.value))
    with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
        divergence = contract.trace(contraction, followed.reader.batch, like, chunk_size)
    return divergence if create_graph else divergence.detach()


def _plan(evaluation: Evaluation, followed: Followed, contraction: Contraction) -> Plan:
    x, reader = evaluation.x, followed.reader
    value, products = max(1.0, reader.multiplications), cost(contraction.network, len(x)) + reader.applied
    memory = contraction.memory(len(x), x) * x.element_size()
    if not evaluation.asked and products > value * evaluation.size:
        raise NoRule(f"its paths take longer than dense products{f' ({_reasons(reader)})' if reader.opaque else ''}")
    if not evaluation.asked and memory > _LARGEST_MEMORY:
        raise NoRule(f"its matrices take {memory / 2**30:.1f} GiB")
    total = 1 + products / value
    return Plan("layered", _why(contraction, reader, value), 0, 1, total, total / 2, memory)


def _why(contraction: Contraction, reader: JacobianReader, value: float) -> str:
    """The reason in the plan: how many paths and rows there are, and what opaque functions cost."""
    count, cut = len(contraction.cycles), contraction.cut
    parts = []
    if count or not cut:
        paths = "one path" if count == 1 else f"{count} paths"
        parts.append(f"{paths} of linear maps and elementwise functions, multiplied out for the whole batch")
    if cut:
        rows = sum(base.size for base in cut)
        parts.append(f"{'one row' if rows == 1 else f'{rows} rows'} carried through {len(cut)} of its places")
    why, through = ", and ".join(parts), contraction.cost_of_opaque(reader.batch) / value
    if reader.opaque:
        why += f"; {_reasons(reader)}, at the price of {through:.2g} forward passes"
    return why


def _reasons(reader: JacobianReader) -> str:
    return f"{', '.join(dict.fromkeys(reader.opaque))}: through products of its own"


def _verify(followed: Followed, contraction: Contraction) -> None:
    """Compare u^T J for a random u with autograd's, and the trace of the first sample with the sum of its diagonal entries.

    Raises:
        NoRule: they disagree.
    """
    value, batch = followed.field.value.detach(), followed.reader.batch
    terms, bases = contraction.network.terms, contraction.network.bases
    dtype, value = followed.output.dtype, value.to(accumulation_dtype(value))
    noise, size = torch.Generator().manual_seed(0), event_size(value)
    u, v = (
        flatten_event(torch.randn(value.shape, generator=noise, dtype=torch.float64, device="cpu").to(value))
        for _ in range(2)
    )
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):

        def rows(vectors: Tensor, magnitudes: bool = False, sample: int | None = None) -> Tensor:
            at = pulled(terms, bases, vectors, magnitudes, sample)
            return at[id(bases[-1])] if at else torch.zeros_like(vectors)

        known = rows(u[:, None]).expand(batch, -1, -1)[:, 0] * v
        true = flatten_event(followed.field.pullback(u.view(1, *value.shape).to(followed.field.value.dtype))[0]) * v
        bound = rows(u[:, None].abs(), magnitudes=True).expand(batch, -1, -1)[:, 0] * v.abs()
        require_equal(known, true.to(known), dtype, "the Jacobian is another", bound)
        if size <= _LARGEST_JACOBIAN and (not followed.reader.opaque or size * batch <= _MOST_ROWS):
            basis = torch.eye(size, device=value.device).to(value)[None]
            entries, bound = (rows(basis, m, sample=0).diagonal(dim1=1, dim2=2) for m in (False, True))
            trace = divergence_of(followed, contraction, None)[:1, None].to(value)
            require_equal(entries, trace, dtype, "its trace does not add up in this precision", bound)

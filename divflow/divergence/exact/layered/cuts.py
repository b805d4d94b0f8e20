"""The trace of all paths through one place of a network: rows carried once around the cycle.

With J = A B for the part of the Jacobian whose paths go through a base of m entries (B is the base's derivative in x,
A the output's in the base), tr(A B) = tr(B A): the m rows of B are pulled back from the base to the input, and from
there, as rows at the output, back down to the base, where row j meets entry j. It costs m products with the matrices
on the way, for the whole batch until a diagonal of one a sample comes in: those of vectors where the base is narrow,
such as a mean of one entry a sample, and no more than D where the base is the input.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from divflow.divergence.exact.layered.jacobian import Base, Linear, Made, Opaque, Term, is_number, put, take

__all__ = ["Network", "cost", "cost_of_opaque", "length", "memory", "pulled", "through"]

# Elements of one bundle of rows, as for dense products.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**20, 2**26


class Network(NamedTuple):
    """A layered Jacobian with the places where its paths are cut.

    Attributes:
        terms: of the output.
        bases: that its paths go through, each before those that it is made from; the input is the last.
        cut: identities of bases; a path belongs to the first of them that it meets on its way from the output.
    """

    terms: list[Term]
    bases: list[Base]
    cut: frozenset[int]

    def leading_to(self, base: Base) -> set[int]:
        """Identities of the base and of those from which a path leads to it that meets none of the cut before."""
        leading = {id(base)}
        for above in reversed(self.bases):
            if above is base or id(above) in self.cut or not isinstance(above, Made):
                continue
            if any(id(term.base) in leading for term in above.source):
                leading.add(id(above))
        return leading

    def below(self, base: Base) -> Iterator[Made]:
        """What may lie between a base and the input, in its order."""
        start = next(i for i, other in enumerate(self.bases) if other is base)
        return (other for other in self.bases[start + 1 :] if isinstance(other, Made))


def through(network: Network, base: Base, batch: int, like: Tensor, chunk_size: int | None) -> Tensor:
    """The trace of the paths that belong to a base of the cut, `(k,)`, or `(1,)` if it is the batch's.

    Args:
        network: its terms and its cut.
        base: one of the cut.
        batch: k.
        like: a tensor of the device and dtype to compute in.
        chunk_size: rows at a time, with their graph dropped and rebuilt; None takes what suits.
    """
    leading = network.leading_to(base)
    chunk = min(base.size, chunk_size or max(1, _limit(like) // max(1, batch * _width(network))))

    def part(start: int, stop: int) -> Tensor:
        rows = _at_input(network, base, like, start, stop)
        return _around(network, base, leading, rows, start, stop)

    total = like.new_zeros(1)
    for start in range(0, base.size, chunk):
        bounds = start, min(base.size, start + chunk)
        if chunk_size is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for other in network.bases:
                if isinstance(other, Opaque):
                    other.settle(bounds[1] - bounds[0])
            total = total + checkpoint(part, *bounds, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + part(*bounds)
    return total


def _at_input(network: Network, base: Base, like: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a base's derivative in x, `(k or 1, rows, D)`."""
    if not isinstance(base, Made):
        return _unit(base.size, like, start, stop)
    at: dict[int, Tensor] = {}
    rows = (
        base.matrix[None, start:stop].to(like)
        if isinstance(base, Linear)
        else base.pull(_unit(base.size, like, start, stop))
    )
    spread(at, base.source, rows)
    for below in network.below(base):
        if id(below) in at:
            spread(at, below.source, below.pull(at.pop(id(below))))
    return at[id(network.bases[-1])]


def _unit(size: int, like: Tensor, start: int, stop: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)[None, start:stop]


def pulled(
    terms: list[Term], bases: list[Base], rows: Tensor, magnitudes: bool = False, sample: int | None = None
) -> dict[int, Tensor]:
    """Rows `(k or 1, r, n)` at a value, times its Jacobian: by identity of the bases that are not made from others.

    The plain reading of the definition, which the contraction is checked by; a row costs one product.

    Args:
        terms: of the value.
        bases: that they are made from, each before those that it is made from itself.
        rows: of one for all samples, or one a sample.
        magnitudes: of all factors, which bound what is left of their roundoff where they cancel.
        sample: the one whose Jacobian is taken, where it is not all samples'.
    """
    at: dict[int, Tensor] = {}
    spread(at, terms, rows, magnitudes, sample)
    for base in bases:
        if isinstance(base, Made) and id(base) in at:
            below = base.pull(at.pop(id(base)), magnitudes)
            below = below if sample is None or len(below) == 1 else below[sample : sample + 1]
            spread(at, base.source, below, magnitudes, sample)
    return at


def _around(network: Network, base: Base, leading: set[int], rows: Tensor, start: int, stop: int) -> Tensor:
    """From the output down to a base, where rows `start` to `stop` meet their entries."""
    at: dict[int, Tensor] = {}
    total = _spread_and_close(at, network.terms, base, leading, rows, None, start, stop)
    for above in network.bases:
        if isinstance(above, Made) and above is not base and id(above) in at:
            total = total + _spread_and_close(at, above.source, base, leading, at.pop(id(above)), above, start, stop)
    return total


def _spread_and_close(
    at: dict[int, Tensor],
    terms: list[Term],
    base: Base,
    leading: set[int],
    rows: Tensor,
    above: Made | None,
    start: int,
    stop: int,
) -> Tensor:
    """Carry the rows, at what is made from some terms if it is given, through these; the trace of what arrives at the base, `(k or 1,)`."""
    total = rows.new_zeros(1)
    closing = [term for term in terms if term.base is base]
    passing = [term for term in terms if term.base is not base and id(term.base) in leading]
    if isinstance(above, Linear) and not passing and all(term.columns is None for term in closing):
        # Of the last product only the entries that meet.
        matrix = above.matrix.to(rows)
        for term in closing:
            entries = (rows * take(matrix, term.rows, 1)[:, start:stop].mT).sum(dim=-1)
            diagonal = term.diagonal
            if diagonal is not None:
                entries = entries * (diagonal if is_number(diagonal) else diagonal[..., start:stop]).to(rows)
            total = total + entries.sum(dim=-1)
        return total
    rows = rows if above is None else above.pull(rows)
    spread(at, passing, rows)
    arrived: dict[int, Tensor] = {}
    spread(arrived, closing, rows)
    return total + arrived[id(base)].diagonal(start, 1, 2).sum(dim=-1) if closing else total


def spread(
    at: dict[int, Tensor], terms: list[Term], rows: Tensor, magnitudes: bool = False, sample: int | None = None
) -> None:
    """Add the rows at a value, `(k or 1, rows, n)`, times its derivative in each of its terms' bases, to those there."""
    for term in terms:
        diagonal, base, columns = term.magnitude if magnitudes else term.diagonal, term.base, term.columns
        part = take(rows, term.rows, -1)
        if diagonal is not None:
            diagonal = diagonal if sample is None or diagonal.ndim < 2 else diagonal[sample : sample + 1]
            part = part * (diagonal[:, None] if diagonal.ndim == 2 else diagonal).to(part)
        part = put(part, columns, base.size)
        at[id(base)] = at[id(base)] + part if id(base) in at else part


def length(term: Term) -> int:
    """The number of entries that a term reaches."""
    return term.base.size if term.columns is None else len(term.columns.index)


def _limit(like: Tensor) -> int:
    return _CPU_ELEMENTS if like.device.type == "cpu" else _ACCELERATOR_ELEMENTS


def _width(network: Network) -> int:
    return max(base.size for base in network.bases)


def memory(network: Network, base: Base, batch: int, like: Tensor) -> int:
    """Count the elements that `through` makes, one bundle of rows at a time, without a graph."""
    width = batch * _width(network)
    return 3 * min(base.size * width, max(_limit(like), width))


def cost(network: Network, base: Base, batch: int, element: int) -> float:
    """Multiplications of `through`: those of its matrix products, and what else takes as long as them.

    Args:
        network: its terms and its cut.
        base: one of the cut.
        batch: k.
        element: what an elementwise operation takes for each entry.
    """
    leading = network.leading_to(base)
    total: float = 0
    at: dict[int, int] = {}
    if isinstance(base, Made):
        own = batch if base.sampled else 1
        total += base.price * own if base.sampled else 0
        total += element * _mark(at, base.source, own, batch)
        for below in network.below(base):
            if id(below) in at:
                own = batch if below.sampled else at[id(below)]
                total += below.price * own
                total += element * _mark(at, below.source, own, batch)
    around: dict[int, int] = {}
    leaving = [term for term in network.terms if id(term.base) in leading]
    total += element * _mark(around, leaving, at.get(id(network.bases[-1]), 1), batch)
    for above in network.bases:
        if isinstance(above, Made) and above is not base and id(above) in leading and id(above) in around:
            source = [term for term in above.source if id(term.base) in leading]
            passing = above.sampled or any(term.base is not base for term in source)
            own = batch if above.sampled else around[id(above)]
            total += (above.price if passing else above.size) * own
            total += element * _mark(around, source, own, batch)
    return base.size * total


def cost_of_opaque(network: Network, base: Base, batch: int) -> float:
    """Multiplications of `through` that are those of products through functions known by their graph alone."""
    passed = {id(below) for below in network.below(base)} | network.leading_to(base)
    prices = (other.price for other in network.bases if isinstance(other, Opaque) and id(other) in passed)
    return base.size * batch * sum(prices)


def _mark(at: dict[int, int], terms: list[Term], samples: int, batch: int) -> int:
    """Note at bases how many samples' rows come there through some terms: one, or the batch.

    Returns:
        The entries that are computed on the way: products with diagonals, sums, and moved ones.
    """
    entries = 0
    for term in terms:
        own = batch if term.diagonal is not None and term.diagonal.ndim == 2 else samples
        steps = (term.diagonal is not None) + (term.columns is not None) + (id(term.base) in at)
        at[id(term.base)] = max(at.get(id(term.base), 1), own)
        entries += steps * own * length(term)
    return entries

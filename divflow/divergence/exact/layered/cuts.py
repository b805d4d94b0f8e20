"""The trace of all paths through one base of a network, the cut, by carrying rows once around the cycle.

Let A B be the part of the Jacobian whose paths go through a base with m entries: B is the derivative of the base in x,
A that of the output in the base. Then

    tr(A B) = tr(B A) = sum_j (B A)_jj

1. The m rows of B are computed by going from the base to the input.
2. They are taken as rows at the output, since input and output have the same entries, and carried down to the base: B A.
3. Entry j of row j is added up.

This takes m vector-Jacobian products. They are shared by the whole batch until a diagonal differs between samples. A narrow
base, such as a mean, makes m small; at the input m is D, and these are the products of the dense method.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from divflow.divergence.exact.layered.jacobian import Base, Linear, Made, Opaque, Term, is_number, put, take

__all__ = ["Network", "cost", "cost_of_opaque", "length", "memory", "pulled", "through"]

# Elements of the rows that are carried at once, as for dense products.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**20, 2**26


class Network(NamedTuple):
    """A layered Jacobian with the places where its paths are cut.

    Attributes:
        terms: the terms of the output.
        bases: all bases on its paths, from the output to the input, which is the last.
        cut: `id`s of the bases where paths are cut. A path belongs to the first of them on its way from the output.
    """

    terms: list[Term]
    bases: list[Base]
    cut: frozenset[int]

    def leading_to(self, base: Base) -> set[int]:
        """The `id`s of the base, and of the bases from which an uncut path leads to it."""
        leading = {id(base)}
        for above in reversed(self.bases):
            if above is base or id(above) in self.cut or not isinstance(above, Made):
                continue
            if any(id(term.base) in leading for term in above.source):
                leading.add(id(above))
        return leading

    def below(self, base: Base) -> Iterator[Made]:
        """The bases after this one, on the way to the input, without the input."""
        start = next(i for i, other in enumerate(self.bases) if other is base)
        return (other for other in self.bases[start + 1 :] if isinstance(other, Made))


def through(network: Network, base: Base, batch: int, like: Tensor, chunk_size: int | None) -> Tensor:
    """The trace of the paths that belong to a base of the cut: `(k,)`, or `(1,)` if it is the same for all samples.

    Args:
        network: the Jacobian and its cut.
        base: one of the cut.
        batch: number of samples k.
        like: a tensor of the device and dtype to compute in.
        chunk_size: rows at a time; the backward pass then computes each chunk again. None takes what fits the memory.
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
    """Multiply rows `(k or 1, r, n)` at a value with its Jacobian; returns the product at each root by the root's `id`.

    It follows the definition term by term, at one product a row, and serves to check the faster ways.

    Args:
        terms: the terms of the value.
        bases: all bases below it, in order from output to input.
        rows: for each sample, or one for all.
        magnitudes: take absolute values of all factors, which bounds the rounding of what cancels.
        sample: number of the one sample whose Jacobian is taken; None for all.
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
    """Carry rows from the output down to a base, and add up entry j of row j for the rows from `start` to `stop`."""
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
    """Carry rows through `above`, if there is one, and then through some terms.

    Rows for other bases are added to `at`. Of what arrives at `base` the trace is returned, `(k or 1,)`.
    """
    total = rows.new_zeros(1)
    closing = [term for term in terms if term.base is base]
    passing = [term for term in terms if term.base is not base and id(term.base) in leading]
    if isinstance(above, Linear) and not passing and all(term.columns is None for term in closing):
        # Only the diagonal of the last product is computed.
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
    """For each term, add rows `(k or 1, r, n)` times the term's selections and diagonal to the rows at the term's base."""
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
    """Count the elements that `through` allocates for one chunk of rows, without a graph."""
    width = batch * _width(network)
    return 3 * min(base.size * width, max(_limit(like), width))


def cost(network: Network, base: Base, batch: int, element: int) -> float:
    """Estimate the cost of `through` in multiplications.

    Args:
        network: the Jacobian and its cut.
        base: one of the cut.
        batch: number of samples k.
        element: cost of an elementwise operation per entry, in multiplications of a matrix product.
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
    """The part of the cost of `through` that is spent in opaque functions."""
    passed = {id(below) for below in network.below(base)} | network.leading_to(base)
    prices = (other.price for other in network.bases if isinstance(other, Opaque) and id(other) in passed)
    return base.size * batch * sum(prices)


def _mark(at: dict[int, int], terms: list[Term], samples: int, batch: int) -> int:
    """Note for each base of some terms how many samples have rows of their own there: 1 or the batch.

    Returns:
        The number of entries that these terms compute, for the products with diagonals, the selections and the sums.
    """
    entries = 0
    for term in terms:
        own = batch if term.diagonal is not None and term.diagonal.ndim == 2 else samples
        steps = (term.diagonal is not None) + (term.columns is not None) + (id(term.base) in at)
        at[id(term.base)] = max(at.get(id(term.base), 1), own)
        entries += steps * own * length(term)
    return entries

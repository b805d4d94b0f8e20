"""Where to cut a layered network, so that its trace takes the fewest multiplications.

- A path that is not cut has a closed form if at most two of its diagonals differ between samples (`contract`).
- All paths through a cut are computed together, by one row for each entry of that base (`cuts`). This is cheap where
  the base is narrow, such as the mean and the variance of a layer normalization.
- All paths go through the input, so a cut there serves a network of any depth. It takes D rows, as the dense method.
"""

import math
from collections.abc import Hashable, Iterator

from divflow.divergence.exact.layered import cuts
from divflow.divergence.exact.layered.cuts import Network, length
from divflow.divergence.exact.layered.jacobian import Base, Linear, Made, Term, is_number
from divflow.divergence.exact.layered.paths import bases_of, chains, number_of_paths
from divflow.tape.cache import Cache

__all__ = ["choose", "cost"]

_MOST_PATHS = 512
# Limit of the search, in terms that are visited: planning a deep network takes a second at most.
_MOST_WORK = 2**20
# Costs beside matrix products, in multiplications of these: to start a path in closed form, to start the rows of a cut,
# and an elementwise operation on one entry.
_PATH, _PLACE, _ELEMENT = 2**18, 2**20, 16


# Cuts of earlier networks, by `_shape`.
_CUTS: Cache[tuple[int, ...]] = Cache(256)


def choose(terms: list[Term], batch: int) -> Network:
    """Cut a Jacobian where that is cheapest."""
    bases = bases_of(terms)
    key = batch, _shape(terms, bases)
    cut = _CUTS.get(key)
    if cut is None:
        cut = _best(terms, bases, batch)
        _CUTS.keep(key, cut)
    return Network(terms, bases, frozenset(id(bases[i]) for i in cut))


def _shape(terms: list[Term], bases: list[Base]) -> Hashable:
    """A key of everything that `cost` depends on."""
    numbers = {id(base): number for number, base in enumerate(bases)}

    def of(terms: list[Term]) -> Hashable:
        return tuple(
            (numbers[id(base)], None if d is None else (d.ndim, is_number(d)), columns and len(columns.index))
            for base, d, _, columns, _ in terms
        )

    parts = (
        (base.matrix.shape if isinstance(base, Linear) else (base.size, base.price), of(base.source))
        if isinstance(base, Made)
        else base.size
        for base in bases
    )
    return of(terms), *parts


def _best(terms: list[Term], bases: list[Base], batch: int) -> tuple[int, ...]:
    """The numbers of the bases to cut at: the cheapest of the candidates, and then without each base that does not pay."""
    costs: dict[tuple[int, ...], float] = {}
    size = len(terms) + sum(len(base.source) for base in bases if isinstance(base, Made))
    left = _MOST_WORK

    def cost_of(cut: tuple[int, ...]) -> float:
        nonlocal left
        left -= size * (1 + len(cut))
        if cut not in costs and left < 0 and cut not in ((), (len(bases) - 1,)):
            return math.inf
        if cut not in costs:
            network = Network(terms, bases, frozenset(id(bases[i]) for i in cut))
            costs[cut] = cost(network, batch, _PATH, _PLACE)
        return costs[cut]

    best = min(_candidates(bases), key=cost_of)
    for i in best:
        best = min(best, tuple(j for j in best if j != i), key=cost_of)
    return best


def _candidates(bases: list[Base]) -> Iterator[tuple[int, ...]]:
    """Cuts to try: none, the input, and for each size all bases up to it, with and without one more."""
    yield ()
    if bases:
        yield (len(bases) - 1,)
    for size in sorted({0, *(base.size for base in bases)}):
        narrow = [i for i, base in enumerate(bases) if base.size <= size]
        yield tuple(narrow)
        yield from (tuple(sorted([*narrow, i])) for i in range(len(bases)) if i not in narrow)


def cost(network: Network, batch: int, path: int = 0, place: int = 0) -> float:
    """Estimate the cost of the trace for the whole batch, in multiplications of matrix products.

    It is infinite if a path that is not cut has no closed form, or if there are too many of them.

    Args:
        network: the Jacobian and its cut.
        batch: number of samples k.
        path: fixed cost of each path in closed form.
        place: fixed cost of each base of the cut.
    """
    paths = number_of_paths(network)
    if sum(paths[id(term.base)] for term in network.terms) > _MOST_PATHS:
        return math.inf
    cut = [base for base in network.bases if id(base) in network.cut]
    total: float = sum(cuts.cost(network, base, batch, _ELEMENT) + place for base in cut)
    for chain in chains(network):
        total += _of_chain(chain, batch) + path
        if total == math.inf:
            break
    return total


def _of_chain(chain: list[Term], batch: int) -> float:
    """The cost of one path in closed form: its matrices are multiplied once, then with the diagonals of each sample."""
    if len(chain) == 1:
        return 0
    if not all(isinstance(term.base, Linear) for term in chain[:-1]):
        return math.inf
    lengths = [length(term) for term in chain]
    shapes = [(lengths[i], lengths[i + 1]) for i in range(len(chain) - 1)]
    sampled = [term.diagonal is not None and term.diagonal.ndim == 2 and not is_number(term.diagonal) for term in chain]
    diagonal = [sampled[0] or sampled[-1], *sampled[1:-1]]
    if sum(diagonal) > 2:
        return math.inf
    per_sample = math.prod(shapes[i][0] for i, has in enumerate(diagonal) if has) if any(diagonal) else 1
    return _merging(shapes, diagonal) + batch * per_sample


def _merging(shapes: list[tuple[int, int]], diagonal: list[bool]) -> int:
    """The cost of multiplying the matrices between diagonals, in order. The last product is a diagonal only, thus elementwise."""
    start = diagonal.index(True) if any(diagonal) else 0
    shapes, diagonal = shapes[start:] + shapes[:start], diagonal[start:] + diagonal[:start]
    total, rows = 0, shapes[0][0]
    for i, (n, m) in enumerate(shapes):
        if i == 0 or diagonal[i]:
            rows = n
        else:
            last = i == len(shapes) - 1 and sum(diagonal) <= 1
            total += rows * n * (1 if last else m)
    return total

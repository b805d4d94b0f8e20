"""Where to cut a layered network: the places at which the trace takes the fewest multiplications.

Without cuts a path is multiplied out in closed form, which there is for at most two diagonals of one a sample. Through a
narrow place, such as the mean and the variance of a layer normalization, vectors are cheaper, and a network of any
depth has all its paths through its input: D rows, the first matrix known, which is what dense products cost at most.
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
# Terms that are looked at in the search, so that planning a deep network takes a second at most.
_MOST_WORK = 2**20
# What takes as long as so many multiplications of a matrix product: to set up a path in closed form, or the rows through
# a place, and to multiply an entry of rows with one of a diagonal, or add it to another.
_PATH, _PLACE, _ELEMENT = 2**18, 2**20, 16


# Where networks are cut, by what they are made of: shapes, and which are diagonals.
_CUTS: Cache[tuple[int, ...]] = Cache(256)


def choose(terms: list[Term], batch: int) -> Network:
    """The Jacobian that some terms stand for, cut where it is cheapest."""
    bases = bases_of(terms)
    key = batch, _shape(terms, bases)
    cut = _CUTS.get(key)
    if cut is None:
        cut = _best(terms, bases, batch)
        _CUTS.keep(key, cut)
    return Network(terms, bases, frozenset(id(bases[i]) for i in cut))


def _shape(terms: list[Term], bases: list[Base]) -> Hashable:
    """All that `cost` depends on."""
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
    """Numbers of the bases to cut at."""
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
    """All bases up to some size, and one more."""
    yield ()
    if bases:
        yield (len(bases) - 1,)
    for size in sorted({0, *(base.size for base in bases)}):
        narrow = [i for i, base in enumerate(bases) if base.size <= size]
        yield tuple(narrow)
        yield from (tuple(sorted([*narrow, i])) for i in range(len(bases)) if i not in narrow)


def cost(network: Network, batch: int, path: int = 0, place: int = 0) -> float:
    """Multiplications of the trace, for the whole batch, those of rows with diagonals counted as what they take.

    It is infinite where a path has no closed form, or too many are left.

    Args:
        network: with its cut.
        batch: k.
        path: what each path in closed form costs beside them.
        place: what each place of the cut does.
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
    """Of one path in closed form: its matrices between diagonals, multiplied once, and two diagonals on both sides."""
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
    """Of multiplying together the matrices between diagonals, in order; closing the cycle is elementwise."""
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

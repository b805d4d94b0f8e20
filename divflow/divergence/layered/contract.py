"""The trace of a Jacobian that is a sum of terms: that of each of its paths, in closed form where there is one.

With diagonals D in at most two places of the cycle D_1 M_1 ... D_p M_p (the other matrices multiplied together, once
for the whole batch) the trace is

    none:  tr(M)        one:  d . diag(M)        two:  d_1^T (M_1 * M_2^T) d_2        (* elementwise)

and with more of them the product is taken over the cheapest of its dimensions.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from divflow.divergence.layered.paths import Cycle

__all__ = ["cost", "memory", "shared_products", "trace"]

# Elements of one bundle of rows in the longer products, as for dense products.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**20, 2**26


Item = TypeVar("Item")

_KEPT: ContextVar[dict[Hashable, tuple[object, Tensor]] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def shared_products() -> Iterator[None]:
    """Within it, the products of a layered network's matrices are computed once, for all divergences.

    They depend on parameters alone, which are taken not to change but by operations that autograd notices (a change
    of `parameter.data` it does not). It must end before anything is differentiated, since the products' graph is shared
    by all divergences within.
    """
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


class _Way(NamedTuple):
    """How a cycle of at least three diagonals is multiplied out: a cycle, cut before its entry `cut`."""

    merged: bool
    cut: int
    multiplications: int


def cost(cycle: Cycle, batch: int) -> int:
    """Multiplications of `trace` for this cycle: those that depend on the batch, and those that do not."""
    shapes, diagonal = [tuple(matrix.shape) for matrix in cycle.matrices], [d is not None for d in cycle.diagonals]
    if not shapes:
        return 0
    if sum(diagonal) >= 3:
        return _best_way(tuple(shapes), tuple(diagonal), batch).multiplications
    shared = _merging_cost(shapes, diagonal)
    per_sample = math.prod(shapes[i][0] for i, has in enumerate(diagonal) if has) if any(diagonal) else 1
    return shared + batch * per_sample


def memory(cycle: Cycle, batch: int) -> int:
    """Elements that `trace` makes for this cycle, one bundle of rows at a time, without a graph."""
    diagonals = sum(d.numel() for d in cycle.diagonals if d is not None)
    if not cycle.matrices:
        return diagonals
    widths = [matrix.shape[0] for matrix, d in zip(cycle.matrices, cycle.diagonals, strict=True) if d is not None]
    if len(widths) >= 3:
        return diagonals + 3 * max(_limit(cycle.matrices[0]), batch * max(widths))
    return diagonals + 3 * math.prod(widths) + sum(matrix.numel() for matrix in cycle.matrices)


def _limit(tensor: Tensor) -> int:
    return _CPU_ELEMENTS if tensor.device.type == "cpu" else _ACCELERATOR_ELEMENTS


def _merging_cost(shapes: list[tuple[int, ...]], diagonal: list[bool]) -> int:
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


@functools.lru_cache(maxsize=1024)
def _best_way(shapes: tuple[tuple[int, ...], ...], diagonal: tuple[bool, ...], batch: int) -> _Way:
    ways = []
    for merged in (False, True):
        extra = 0
        if merged:
            extra = _merging_cost(list(shapes), list(diagonal))
            places = [i for i, has in enumerate(diagonal) if has]
            following = [*places[1:], places[0]]
            shapes = tuple((shapes[i][0], shapes[j][0]) for i, j in zip(places, following, strict=True))
            diagonal = (True,) * len(places)
        for cut in range(len(shapes)):
            order = [*range(cut, len(shapes)), *range(cut)]
            rows, total, sampled = shapes[cut][0], extra, False
            for i in order[1:-1]:
                # The running product (rows, n) is one a sample as soon as a diagonal is in it.
                sampled = sampled or diagonal[i]
                total += (batch if sampled else 1) * rows * math.prod(shapes[i])
            ways.append(_Way(merged, cut, total + batch * rows * shapes[order[-1]][0]))
    return min(ways, key=lambda way: way.multiplications)


def trace(cycles: list[Cycle], batch: int, like: Tensor, chunk_size: int | None) -> Tensor:
    """The sum of the traces of all cycles, `(k,)`.

    Args:
        cycles: of one Jacobian.
        batch: k.
        like: a tensor of the device and dtype to sum in.
        chunk_size: rows of a longer product at a time, with their graph dropped and rebuilt; None takes what suits.
    """
    total = like.new_zeros(batch)
    with torch.autocast(like.device.type, enabled=False):
        bilinear: dict[tuple[int, int], list] = {}
        for cycle in cycles:
            cycle = _converted(cycle, like)
            places = [i for i, diagonal in enumerate(cycle.diagonals) if diagonal is not None]
            factors = [diagonal for diagonal in cycle.diagonals if diagonal is not None]
            if not cycle.matrices:
                total = total + factors[0].sum(dim=-1)
            elif len(places) >= 3:
                total = total + _long(cycle, batch, chunk_size)
            elif len(places) == 2:
                first, second = factors
                weights = _kept(cycle, places, functools.partial(_bilinear_form, cycle, *places))
                bilinear.setdefault((id(first), id(second)), [first, second]).append(weights)
            else:
                start = places[0] if places else 0
                weights = _kept(cycle, places, functools.partial(_diagonal_of, _rotated(cycle.matrices, start)))
                total = total + (factors[0] @ weights if factors else weights.sum())
        for first, second, *matrices in bilinear.values():
            # Paths through the same two diagonals (residual connections) share one product.
            matrix = matrices[0] if len(matrices) == 1 else torch.stack(matrices).sum(dim=0)
            total = total + ((first @ matrix) * second).sum(dim=1)
    return total


def _converted(cycle: Cycle, like: Tensor) -> Cycle:
    diagonals = [None if d is None else d.to(like) for d in cycle.diagonals]
    return cycle._replace(diagonals=diagonals, matrices=[matrix.to(like) for matrix in cycle.matrices])


def _kept(cycle: Cycle, places: list[int], compute: Callable[[], Tensor]) -> Tensor:
    """What is computed from a cycle's matrices, or was before, within `shared_products`."""
    kept = _KEPT.get()
    origins = [origin for origin in cycle.origins if origin and isinstance(origin.tensor, nn.Parameter)]
    if kept is None or len(origins) < len(cycle.origins):
        return compute()
    key = (
        *((id(origin.tensor), *origin[1:]) for origin in origins),
        *places,
        cycle.matrices[0].dtype,
        torch.is_grad_enabled(),
    )
    if key not in kept:
        kept[key] = cycle.origins, compute()  # with the tensors, so that their identities stay theirs
    return kept[key][1]


def _bilinear_form(cycle: Cycle, start: int, stop: int) -> Tensor:
    """M_1 * M_2^T."""
    back = [matrix.mT for matrix in reversed(_between(cycle, stop, start))]
    # The transposed product, not a product's transpose: its rows lie in memory as those of the other.
    return _product(_between(cycle, start, stop)) * _product(back)


def _rotated(items: list[Item], start: int) -> list[Item]:
    return items[start:] + items[:start]


def _between(cycle: Cycle, start: int, stop: int) -> list[Tensor]:
    """The matrices from one diagonal to the next."""
    count = (stop - start) % len(cycle.matrices) or len(cycle.matrices)
    return _rotated(cycle.matrices, start)[:count]


def _product(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.linalg.multi_dot(matrices)


def _diagonal_of(matrices: list[Tensor]) -> Tensor:
    """diag(M_1 ... M_p), without the last product."""
    if len(matrices) == 1:
        return matrices[0].diagonal()
    return (_product(matrices[:-1]) * matrices[-1].mT).sum(dim=1)


def _long(cycle: Cycle, batch: int, chunk_size: int | None) -> Tensor:
    """Three or more diagonals: rows of the running product, some at a time, closed with the last matrix."""
    shapes = tuple(tuple(matrix.shape) for matrix in cycle.matrices)
    way = _best_way(shapes, tuple(d is not None for d in cycle.diagonals), batch)
    if way.merged:
        places = [i for i, diagonal in enumerate(cycle.diagonals) if diagonal is not None]
        following = [*places[1:], places[0]]
        matrices = [_product(_between(cycle, i, j)) for i, j in zip(places, following, strict=True)]
        cycle = Cycle([cycle.diagonals[i] for i in places], matrices)
    diagonals, matrices = _rotated(cycle.diagonals, way.cut), _rotated(cycle.matrices, way.cut)
    rows, width = matrices[0].shape[0], max(matrix.shape[1] for matrix in matrices)
    chunk = min(rows, chunk_size or max(1, _limit(matrices[0]) // max(1, batch * width)))

    def part(start: int, stop: int) -> Tensor:
        running = matrices[0][start:stop]
        for diagonal, matrix in zip(diagonals[1:-1], matrices[1:-1], strict=True):
            running = (running if diagonal is None else running * diagonal[:, None, :]) @ matrix
        if diagonals[-1] is not None:
            running = running * diagonals[-1][:, None, :]
        entries = (running * matrices[-1][:, start:stop].mT).sum(dim=-1)
        # The diagonal at the cut is the same as one at the end of the cycle.
        return (entries if diagonals[0] is None else entries * diagonals[0][:, start:stop]).sum(dim=-1)

    total = matrices[0].new_zeros(batch)
    for start in range(0, rows, chunk):
        bounds = start, min(rows, start + chunk)
        if chunk_size is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            total = total + checkpoint(part, *bounds, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + part(*bounds)
    return total

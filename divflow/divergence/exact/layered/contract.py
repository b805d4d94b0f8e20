"""The trace of a layered Jacobian: the sum of the traces of its paths.

A path is a cycle D_1 M_1 ... D_p M_p of diagonals D and matrices M. Matrices without a diagonal between them are
multiplied once for the whole batch. With at most two diagonals left the trace is

    none:  tr(M)        one:  d . diag(M)        two:  d_1^T (M_1 * M_2^T) d_2        (* elementwise)

A diagonal that is one number per sample, such as a noise level, commutes with all others and multiplies the result. Paths
with more diagonals go through a cut of the network, where rows are carried around the cycle (`cuts`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from divflow.divergence.exact.layered import cuts
from divflow.divergence.exact.layered.cuts import Network
from divflow.divergence.exact.layered.jacobian import Base
from divflow.divergence.exact.layered.paths import Cycle, cycles

__all__ = ["Contraction", "contraction", "shared_products", "trace"]

Item = TypeVar("Item")

_KEPT: ContextVar[dict[Hashable, tuple[object, Tensor]] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def shared_products() -> Iterator[None]:
    """Compute the matrix products of a layered network once, for all divergences inside.

    The products depend on parameters alone, which must not change except by operations that autograd notices (it does not
    notice a change of `parameter.data`). The context must end before anything is differentiated, because all divergences
    inside share the graph of the products.

    Example:
        >>> import torch
        >>> from divflow.divergence import divergence
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> def field(t, x):
        ...     return net(x)
        >>> with shared_products():
        ...     divergences = [divergence(field, t, torch.randn(5, 3)) for t in (0.0, 0.5, 1.0)]
    """
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


class Contraction(NamedTuple):
    """How a trace is computed: a network with its cut, and the cycles of the paths in closed form."""

    network: Network
    cycles: list[Cycle]

    @property
    def cut(self) -> list[Base]:
        """The bases where paths are cut."""
        return [base for base in self.network.bases if id(base) in self.network.cut]

    def cost_of_opaque(self, batch: int) -> float:
        """The part of the cost that is spent in opaque functions, in multiplications."""
        return sum(cuts.cost_of_opaque(self.network, base, batch) for base in self.cut)

    def memory(self, batch: int, like: Tensor) -> int:
        """Elements that `trace` allocates, without a graph."""
        closed = sum(map(_memory, self.cycles))
        return closed + sum(cuts.memory(self.network, base, batch, like) for base in self.cut)


def contraction(network: Network, size: int) -> Contraction:
    """Find the cycles of a network with D = `size` entries."""
    return Contraction(network, cycles(network, size))


def _memory(cycle: Cycle) -> int:
    diagonals = sum(d.numel() for d in cycle.diagonals if d is not None)
    if not cycle.matrices:
        return diagonals
    widths = [matrix.shape[0] for matrix, d in zip(cycle.matrices, cycle.diagonals, strict=True) if d is not None]
    return diagonals + 3 * math.prod(widths) + sum(matrix.numel() for matrix in cycle.matrices)


def trace(contraction: Contraction, batch: int, like: Tensor, chunk_size: int | None) -> Tensor:
    """The sum of the traces of all paths, `(k,)`.

    Args:
        contraction: the paths of a Jacobian.
        batch: number of samples k.
        like: a tensor of the device and dtype to sum in.
        chunk_size: rows of a cut at a time; the backward pass then computes each chunk again. None takes what fits the memory.
    """
    total, device = like.new_zeros(batch), like.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
        bilinear: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for base in contraction.cut:
            total = total + cuts.through(contraction.network, base, batch, like, chunk_size)
        for cycle in contraction.cycles:
            cycle = _converted(cycle, like)
            places = [i for i, diagonal in enumerate(cycle.diagonals) if diagonal is not None]
            factors = [diagonal for diagonal in cycle.diagonals if diagonal is not None]
            if not cycle.matrices:
                total = total + factors[0].sum(dim=-1)
            elif len(places) == 2:
                weights = _kept(cycle, places, functools.partial(_bilinear_form, cycle, *places))
                key = (*map(id, factors), *map(id, cycle.numbers))
                bilinear.setdefault(key, (factors, cycle.numbers, []))[2].append(weights)
            else:
                start = places[0] if places else 0
                weights = _kept(cycle, places, functools.partial(_diagonal_of, _rotated(cycle.matrices, start)))
                total = total + _times(factors[0] @ weights if factors else weights.sum(), cycle.numbers)
        for (first, second), numbers, matrices in bilinear.values():
            # Paths through the same two diagonals (residual connections) share one product.
            matrix = matrices[0] if len(matrices) == 1 else torch.stack(matrices).sum(dim=0)
            total = total + _times(((first @ matrix) * second).sum(dim=1), numbers)
    return total


def _times(trace: Tensor, numbers: list[Tensor]) -> Tensor:
    """Multiply a trace with numbers per sample, each `(k, 1)`."""
    for number in numbers:
        trace = trace * number[:, 0]
    return trace


def _converted(cycle: Cycle, like: Tensor) -> Cycle:
    diagonals = [None if d is None else d.to(like) for d in cycle.diagonals]
    matrices, numbers = ([z.to(like) for z in tensors] for tensors in (cycle.matrices, cycle.numbers))
    return cycle._replace(diagonals=diagonals, matrices=matrices, numbers=numbers)


def _kept(cycle: Cycle, places: list[int], compute: Callable[[], Tensor]) -> Tensor:
    """Compute something from a cycle's matrices; within `shared_products` the result is kept for the next call."""
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
        kept[key] = cycle.origins, compute()  # the tensors are kept, too, so that no other gets their `id`
    return kept[key][1]


def _bilinear_form(cycle: Cycle, start: int, stop: int) -> Tensor:
    """M_1 * M_2^T (elementwise), where M_1 leads from the first diagonal to the second and M_2 back."""
    back = [matrix.mT for matrix in reversed(_between(cycle, stop, start))]
    # M_2^T is computed as a product of transposes, so that its memory layout is that of M_1.
    return _product(_between(cycle, start, stop)) * _product(back)


def _rotated(items: list[Item], start: int) -> list[Item]:
    return items[start:] + items[:start]


def _between(cycle: Cycle, start: int, stop: int) -> list[Tensor]:
    """The matrices from one diagonal to the other, in order around the cycle."""
    count = (stop - start) % len(cycle.matrices) or len(cycle.matrices)
    return _rotated(cycle.matrices, start)[:count]


def _product(matrices: list[Tensor]) -> Tensor:
    if len(matrices) < 3:
        return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
    return torch.linalg.multi_dot(matrices)


def _diagonal_of(matrices: list[Tensor]) -> Tensor:
    """diag(M_1 ... M_p); of the last product only the diagonal is computed."""
    if len(matrices) == 1:
        return matrices[0].diagonal()
    return (_product(matrices[:-1]) * matrices[-1].mT).sum(dim=1)

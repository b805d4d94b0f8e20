"""The paths of a layered network from output to input, each a product around a cycle.

A path is a product D_1 M_1 D_2 M_2 ... D_p M_p of shared matrices M and diagonals D, whose trace is cyclic. Paths through a
cut of the network are left out; `cuts` computes these.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from divflow.divergence.exact.layered.cuts import Network
from divflow.divergence.exact.layered.jacobian import (
    Base,
    Diagonal,
    Entries,
    Linear,
    Made,
    Term,
    entries_of,
    is_number,
    product,
    take,
)
from divflow.tape.operation import version

__all__ = ["Cycle", "Origin", "bases_of", "chains", "cycles", "number_of_paths"]


class Cycle(NamedTuple):
    """A cyclic product D_1 M_1 ... D_p M_p.

    Attributes:
        diagonals: D_1, ..., D_p: one per sample, `(k, n)`, or None for ones. Without matrices there is one diagonal, of any
            form, whose sum is the trace.
        matrices: M_1, ..., M_p.
        numbers: further factors of the trace, one number per sample, `(k, 1)`.
        origins: where each matrix comes from; None if it was computed.
    """

    diagonals: list[Diagonal]
    matrices: list[Tensor]
    numbers: list[Tensor] = []
    origins: list["Origin | None"] = []


class Origin(NamedTuple):
    """Where a matrix of a cycle comes from: rows and columns of a tensor, and the tensor's version against changes in place."""

    tensor: Tensor
    version: int
    rows: Entries | None
    columns: Entries | None


def bases_of(terms: list[Term]) -> list[Base]:
    """All bases that some terms depend on, ordered from output to input: each stands before those that it depends on."""
    found: list[Base] = []
    seen: set[int] = set()
    stack: list[tuple[Base, bool]] = [(term.base, False) for term in terms]
    while stack:
        base, finished = stack.pop()
        if finished:
            found.append(base)
        elif id(base) not in seen:
            seen.add(id(base))
            stack.append((base, True))
            if isinstance(base, Made):
                stack.extend((term.base, False) for term in base.source if id(term.base) not in seen)
    return found[::-1]


def cycles(network: Network, size: int) -> list[Cycle]:
    """The uncut paths from output to input as cycles; both have D = `size` entries."""
    closed = (_closed(chain, size) for chain in chains(network))
    return [cycle for cycle in closed if cycle is not None]


def number_of_paths(network: Network) -> dict[int, int]:
    """The number of uncut paths from each base to the input, by the base's `id`."""
    found: dict[int, int] = {}
    for base in reversed(network.bases):
        below = sum(found[id(term.base)] for term in base.source) if isinstance(base, Made) else 1
        found[id(base)] = 0 if id(base) in network.cut else below
    return found


def chains(network: Network) -> Iterator[list[Term]]:
    """The terms of each uncut path, from output to input; paths come depth first."""
    paths = number_of_paths(network) if network.cut else None
    chains = [[term] for term in reversed(network.terms) if paths is None or paths[id(term.base)]]
    while chains:
        chain = chains.pop()
        base = chain[-1].base
        if isinstance(base, Made):
            chains.extend([*chain, term] for term in reversed(base.source) if paths is None or paths[id(term.base)])
        else:
            yield chain


def _closed(chain: list[Term], size: int) -> Cycle | None:
    """Close a path to a cycle: entry i of the input is joined with entry i of the output. None if no entries meet."""
    outer, inner = chain[0], chain[-1]
    if len(chain) == 1:
        fixed = _fixed(outer.rows, outer.columns, size)
        entries = torch.ones((), device="cpu") if outer.diagonal is None else entries_of(outer.diagonal, fixed)
        count = size if fixed is None else len(fixed.index)
        return Cycle([entries.expand(*entries.shape[:-1], count)], []) if count else None
    at_output, at_input = _meeting(outer.rows, inner.columns, size)
    if at_output is not None and not len(at_output.index):
        return None
    # Around the cycle the outermost and the innermost diagonal stand beside each other, so their product is the first.
    diagonals = [product(_take_diagonal(outer.diagonal, at_output), _take_diagonal(inner.diagonal, at_input))]
    diagonals += [term.diagonal for term in chain[1:-1]]
    matrices: list[Tensor] = []
    origins: list[Origin | None] = []
    for i, (above, below) in enumerate(itertools.pairwise(chain)):
        rows = _compose(above.columns, at_output) if i == 0 else above.columns
        columns = _compose(below.rows, at_input) if i == len(chain) - 2 else below.rows
        assert isinstance(above.base, Linear)  # all but the last of a chain
        matrix = above.base.matrix
        origins.append(Origin(matrix, version(matrix), rows, columns))
        matrices.append(take(take(matrix, rows, 0), columns, 1))
    numbers = []
    for i, diagonal in enumerate(diagonals):
        if diagonal is not None and diagonal.ndim < 2:
            matrices[i] = matrices[i] * diagonal.reshape(-1, 1).to(matrices[i])
            diagonals[i] = origins[i] = None
        elif diagonal is not None and is_number(diagonal):
            numbers.append(diagonal)
            diagonals[i] = None
    return Cycle(diagonals, matrices, numbers, origins)


@functools.lru_cache(maxsize=1024)
def _fixed(rows: Entries | None, columns: Entries | None, size: int) -> Entries | None:
    """Positions where `rows` and `columns` hold the same entry; None if both are all entries in order."""
    if rows is None and columns is None:
        return None
    at = [np.arange(size) if entries is None else entries.index for entries in (rows, columns)]
    return Entries(np.flatnonzero(at[0] == at[1]))


def _take_diagonal(diagonal: Diagonal, entries: Entries | None) -> Diagonal:
    """Select entries of a diagonal; None stands for ones."""
    return None if diagonal is None else entries_of(diagonal, entries)


@functools.lru_cache(maxsize=1024)
def _meeting(rows: Entries | None, columns: Entries | None, size: int) -> tuple[Entries | None, Entries | None]:
    """Positions in `rows` and in `columns` of the entries that both hold, in the order of `columns`."""
    if rows is None and columns is None:
        return None, None
    position = np.arange(size)
    if rows is not None:
        position = np.full(size, -1)
        position[rows.index] = np.arange(len(rows.index))
    columns_index = np.arange(size) if columns is None else columns.index
    met = position[columns_index]
    kept = np.flatnonzero(met >= 0)
    return Entries(met[kept]), Entries(kept)


@functools.lru_cache(maxsize=1024)
def _compose(entries: Entries | None, chosen: Entries | None) -> Entries | None:
    if entries is None or chosen is None:
        return entries if chosen is None else chosen
    return Entries(entries.index[chosen.index])

"""The Jacobian of a layered value, as a sum of terms `diagonal * base`, without any of its entries.

A value v of n entries a sample has the Jacobian

    dv/dx = sum over terms of  P_rows diag(diagonal) P_columns^T (d base / dx)

where a base is the input itself, a shared matrix applied to another such sum, or a function of one that is known by its
products alone, and the selections P say which entries of v a term reaches, and from which of the base.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from divflow.operators.linearization import Linearization

__all__ = [
    "Base",
    "Diagonal",
    "Entries",
    "Linear",
    "Made",
    "Movement",
    "Opaque",
    "Term",
    "add",
    "entries_of",
    "is_number",
    "linear",
    "move",
    "product",
    "put",
    "scale",
    "take",
]

# A diagonal is None (ones), shared by the batch and of shape () or (r,), or one a sample, (k, r), or (k, 1) where it is
# one number for all entries, which commutes with every matrix.
Diagonal = Tensor | None
# How many times narrower a layer's output must be to be multiplied with the layer below.
_NARROW = 8


class Entries:
    """A choice of a vector's entries, in order; made by `entries`, so that equal ones are one object."""

    def __init__(self, index: np.ndarray) -> None:
        self.index = index
        contiguous = len(index) > 0 and bool((np.diff(index) == 1).all())
        self._start = int(index[0]) if contiguous else None
        # One entry over and over, as a mean that is subtracted: views, again.
        self._only = int(index[0]) if len(index) > 1 and bool((index == index[0]).all()) else None
        self._on_device: dict[torch.device, Tensor] = {}

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """These entries of a tensor's dimension: a view where they are contiguous."""
        if self._start is not None:
            return tensor.narrow(dim, self._start, len(self.index))
        if self._only is not None:
            shape = list(tensor.shape)
            shape[dim] = len(self.index)
            return tensor.narrow(dim, self._only, 1).expand(shape)
        return tensor.index_select(dim, self._at(tensor.device))

    def put(self, tensor: Tensor, size: int) -> Tensor:
        """A vector of `size` entries, the last dimension, to which a tensor's are added at these."""
        if self._only is not None and size == 1:
            return tensor.sum(dim=-1, keepdim=True)
        return tensor.new_zeros(*tensor.shape[:-1], size).index_add(-1, self._at(tensor.device), tensor)

    def _at(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            with torch.inference_mode(False):  # kept, for calls that may train
                self._on_device[device] = torch.tensor(self.index, device=device)
        return self._on_device[device]


@functools.lru_cache(maxsize=4096)
def _interned(index: bytes) -> Entries:
    return Entries(np.frombuffer(index, dtype=np.int64))


def _entries(index: np.ndarray, size: int) -> Entries | None:
    """The entries `index` of `size`; None for all of them in order."""
    if len(index) == size and (index == np.arange(size)).all():
        return None
    return _interned(index.astype(np.int64).tobytes())


class Base:
    """The input x of D entries: its derivative in x is the identity."""

    def __init__(self, size: int) -> None:
        self.size = size


class Made(Base):
    """What is made from a value, whose terms are `source`.

    Attributes:
        source: the terms of that value.
        sampled: whether its derivative is another for each sample.
        price: multiplications of a row with the derivative, for a sample.
    """

    source: "list[Term]"
    sampled: bool
    price: float

    def pull(self, rows: Tensor, magnitudes: bool = False) -> Tensor:
        """Rows `(k or 1, r, n)` at its entries, times its derivative in the value, `(k or 1, r, m)`.

        Args:
            rows: whose first dimension is the samples, or one for all.
            magnitudes: whether of the factors' magnitudes, which bound the rounding.
        """
        raise NotImplementedError


class Linear(Made):
    """A matrix, the same for the whole batch, applied to a value.

    Args:
        matrix: `(n, m)`.
        source: the terms of that value, of m entries.
    """

    sampled = False

    def __init__(self, matrix: Tensor, source: "list[Term]") -> None:
        super().__init__(matrix.shape[0])
        self.matrix, self.source, self.price = matrix, source, matrix.numel()

    def pull(self, rows: Tensor, magnitudes: bool = False) -> Tensor:
        """A matrix product."""
        return rows @ (self.matrix.abs() if magnitudes else self.matrix).to(rows)


class Opaque(Made):
    """A function that is known by its graph alone, of a value of m entries.

    Args:
        name: of the function.
        at: products with its Jacobian.
        like: the value that it is a function of.
        price: multiplications of one product, for a sample.
        source: the terms of the value.
    """

    sampled = True

    def __init__(self, name: str, at: Linearization, like: Tensor, price: float, source: "list[Term]") -> None:
        super().__init__(at.value.shape[1:].numel())
        self.name, self.price, self.source = name, price, source
        self._at, self._batch, self._shape = at, len(like), at.value.shape

    def settle(self, count: int) -> None:
        """Decide how so many products are taken, before a first computation that a second one is to repeat."""
        self._at.batches(count)

    def pull(self, rows: Tensor, magnitudes: bool = False) -> Tensor:
        """Vector-Jacobian products through the function."""
        count = rows.shape[1]
        vectors = rows.expand(self._batch, -1, -1).transpose(0, 1).reshape(count, *self._shape)
        vectors = vectors.to(self._at.value.dtype)
        products = self._at.pullback(self._at.before(vectors) if torch.is_grad_enabled() else vectors)
        products = products.reshape(count, self._batch, -1).transpose(0, 1).to(rows)
        return products.abs() if magnitudes else products


class Term(NamedTuple):
    """Entries `columns` of a base, times `diagonal`, at the entries `rows` of a value; None takes all in order.

    `summed` is what a diagonal that is a sum would be if nothing in it cancelled, which bounds its rounding; None where it
    is no sum, or nobody asks.
    """

    base: Base
    diagonal: Diagonal = None
    rows: Entries | None = None
    columns: Entries | None = None
    summed: Diagonal = None

    @property
    def magnitude(self) -> Diagonal:
        """What bounds the rounding of the diagonal."""
        return self.diagonal.abs() if self.summed is None and self.diagonal is not None else self.summed


def take(matrix: Tensor, entries: Entries | None, dim: int) -> Tensor:
    """`entries` of a matrix's dimension."""
    return matrix if entries is None else entries.take(matrix, dim)


def is_number(diagonal: Diagonal) -> bool:
    """Whether a diagonal is one number for all entries, the batch's or each sample's."""
    return diagonal is not None and (diagonal.ndim == 0 or (diagonal.ndim == 2 and diagonal.shape[1] == 1))


def entries_of(diagonal: Tensor, entries: Entries | None) -> Tensor:
    """A diagonal's entries, of whatever kind it is."""
    return diagonal if is_number(diagonal) else take(diagonal, entries, -1)


def put(tensor: Tensor, entries: Entries | None, size: int) -> Tensor:
    """The transpose of `take` for the last dimension: what is at the same entry is added up."""
    return tensor if entries is None else entries.put(tensor, size)


def product(a: Diagonal, b: Diagonal) -> Diagonal:
    """The product of two diagonals."""
    if a is None or b is None:
        return b if a is None else a
    return a * b


def scale(terms: list[Term], factor: Tensor) -> list[Term]:
    """The terms of `factor * v`, a diagonal's."""
    scaled, products = [], {}
    for base, diagonal, rows, columns, summed in terms:
        key = id(diagonal), id(rows)
        if key not in products:  # equal diagonals stay one object, by which paths through them share a product
            products[key] = product(diagonal, entries_of(factor, rows))
        bound = None if summed is None else product(summed, entries_of(factor.abs(), rows))
        scaled.append(Term(base, products[key], rows, columns, bound))
    return scaled


def add(*sums: list[Term], bounded: bool = False) -> list[Term]:
    """The terms of a sum of values; those of one base and the same entries become one.

    Args:
        sums: the terms of each value.
        bounded: whether what cancels is to be known (`Term.summed`).
    """
    merged: dict[tuple[int, ...], Term] = {}
    for term in (term for terms in sums for term in terms):
        key = id(term.base), id(term.rows), id(term.columns)
        if key in merged:
            diagonal = _sum(merged[key].diagonal, term.diagonal)
            summed = _sum(merged[key].magnitude, term.magnitude) if bounded else None
            merged[key] = Term(term.base, diagonal, term.rows, term.columns, summed)
        else:
            merged[key] = term
    return _joined(list(merged.values()))


def _joined(terms: list[Term]) -> list[Term]:
    """Of a matrix and a narrow one, expanded, on the same value make one matrix: I - 11^T / n goes into the layer."""
    for wide in terms:
        if isinstance(wide.base, Linear) and wide.rows is None and wide.columns is None and _is_shared(wide.diagonal):
            for narrow in terms:
                if (
                    isinstance(narrow.base, Linear)
                    and narrow.base.source is wide.base.source
                    and narrow.base.matrix.dtype == wide.base.matrix.dtype
                    and narrow.base.size < wide.base.size
                    and narrow.rows is None
                    and (narrow.diagonal is None or narrow.diagonal.ndim == 0)
                ):
                    matrix = _rows_scaled(wide.base.matrix, wide.diagonal)
                    matrix = matrix + take(_rows_scaled(narrow.base.matrix, narrow.diagonal), narrow.columns, 0)
                    rest = [term for term in terms if term is not wide and term is not narrow]
                    return [Term(Linear(matrix, wide.base.source)), *rest]
    return terms


def _is_shared(diagonal: Diagonal) -> bool:
    return diagonal is None or diagonal.ndim < 2


def _rows_scaled(matrix: Tensor, diagonal: Diagonal) -> Tensor:
    return matrix if diagonal is None else matrix * diagonal.reshape(-1, 1).to(matrix)


def linear(matrix: Tensor, terms: list[Term]) -> list[Term]:
    """The terms of a matrix `(n, m)`, the same for the whole batch, applied to a value.

    A narrow matrix on one layer is multiplied with it: the mean of a layer's entries is a row on the layer's input.
    """
    if len(terms) == 1 and _NARROW * matrix.shape[0] <= matrix.shape[1]:
        base, diagonal, rows, columns, _ = terms[0]
        whole = rows is None and columns is None and _is_shared(diagonal)
        if whole and isinstance(base, Linear) and base.matrix.dtype == matrix.dtype:
            return [Term(Linear(matrix @ _rows_scaled(base.matrix, diagonal), base.source))]
    return [Term(Linear(matrix, terms))] if terms else []


def _sum(a: Diagonal, b: Diagonal) -> Tensor:
    if a is None:
        return torch.tensor(2.0, device="cpu") if b is None else 1 + b
    return 1 + a if b is None else a + b


@dataclass(frozen=True, eq=False)
class Movement:
    """The value whose entry j is v[index[j]], or a constant where index[j] < 0, of a value v of `size` entries."""

    size: int
    index: np.ndarray


def move(terms: list[Term], movement: Movement) -> list[Term]:
    """The terms of the moved value."""
    moved, taken = [], {}
    for term in terms:
        place = _moved(movement, term.rows, term.columns, term.base.size)
        if place is not None:
            chosen, rows, columns = place
            key = id(term.diagonal), id(chosen)
            if key not in taken:
                taken[key] = None if term.diagonal is None else entries_of(term.diagonal, chosen)
            summed = None if term.summed is None else entries_of(term.summed, chosen)
            moved.append(Term(term.base, taken[key], rows, columns, summed))
    return moved


@functools.lru_cache(maxsize=4096)
def _moved(
    movement: Movement, rows: Entries | None, columns: Entries | None, base_size: int
) -> tuple[Entries | None, Entries | None, Entries | None] | None:
    """Which entries of a term are left after a movement, its new rows and its new columns; None if it has none left."""
    size, index = movement.size, movement.index
    position = np.arange(size)
    if rows is not None:
        position = np.full(size, -1)
        position[rows.index] = np.arange(len(rows.index))
    pick = np.full(len(index), -1)
    pick[index >= 0] = position[index[index >= 0]]
    reached = np.flatnonzero(pick >= 0)
    pick = pick[reached]
    if not len(reached):
        return None
    length = base_size if columns is None else len(columns.index)
    chosen = _entries(pick, length)
    new_columns = columns if chosen is None else _entries(pick if columns is None else columns.index[pick], base_size)
    return chosen, _entries(reached, len(index)), new_columns

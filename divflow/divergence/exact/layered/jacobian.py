"""The Jacobian of a value as a sum of terms, which are diagonals times bases; its entries are never formed.

A value v with n entries per sample has the Jacobian

    dv/dx = sum over terms of  P_rows diag(diagonal) P_columns^T (d base / dx)

A base is one of three:

- the input x, whose derivative is the identity;
- a matrix that the batch shares, applied to another value (`Linear`);
- a function of another value of which only products with the Jacobian are known (`Opaque`).

The selections P say which entries of v a term reaches, and which entries of the base it takes.
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

# None for ones; () or (r,) for the whole batch; (k, r) per sample; (k, 1) one number per sample, which commutes with matrices.
Diagonal = Tensor | None
# A matrix is multiplied with the layer below it if it has so many times fewer rows than columns.
_NARROW = 8


class Entries:
    """A list of indices into a vector. Those from `_entries` are interned: equal lists are one object, compared by `id`."""

    def __init__(self, index: np.ndarray) -> None:
        self.index = index
        contiguous = len(index) > 0 and bool((np.diff(index) == 1).all())
        self._start = int(index[0]) if contiguous else None
        # One entry, repeated, such as a mean that is subtracted from all entries: a view serves here, too.
        self._only = int(index[0]) if len(index) > 1 and bool((index == index[0]).all()) else None
        self._on_device: dict[torch.device, Tensor] = {}

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Select these entries along a dimension of a tensor: a view if they are contiguous or one entry repeated."""
        if self._start is not None:
            return tensor.narrow(dim, self._start, len(self.index))
        if self._only is not None:
            shape = list(tensor.shape)
            shape[dim] = len(self.index)
            return tensor.narrow(dim, self._only, 1).expand(shape)
        return tensor.index_select(dim, self._at(tensor.device))

    def put(self, tensor: Tensor, size: int) -> Tensor:
        """The transpose of `take`: zeros of `size` entries in the last dimension, with the tensor added at these indices."""
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
    """Intern a list of indices into `size` entries; None if it is all of them in order."""
    if len(index) == size and (index == np.arange(size)).all():
        return None
    return _interned(index.astype(np.int64).tobytes())


class Base:
    """What the terms of a Jacobian refer to. This class itself is the input x, whose derivative is the identity."""

    def __init__(self, size: int) -> None:
        self.size = size


class Made(Base):
    """A base that is a function of another value.

    Attributes:
        source: the terms of that value.
        sampled: whether its derivative differs from sample to sample.
        price: multiplications of one vector-Jacobian product for one sample.
    """

    source: "list[Term]"
    sampled: bool
    price: float

    def pull(self, rows: Tensor, magnitudes: bool = False) -> Tensor:
        """Multiply rows with this base's derivative in the value: `(k or 1, r, n)` to `(k or 1, r, m)`.

        Args:
            rows: for each sample, or one for all samples.
            magnitudes: take absolute values of the derivative, for a bound on the rounding.
        """
        raise NotImplementedError


class Linear(Made):
    """A matrix, the same for the whole batch, applied to a value.

    Args:
        matrix: `(n, m)`.
        source: the terms of the value, which has m entries.
    """

    sampled = False

    def __init__(self, matrix: Tensor, source: "list[Term]") -> None:
        super().__init__(matrix.shape[0])
        self.matrix, self.source, self.price = matrix, source, matrix.numel()

    def pull(self, rows: Tensor, magnitudes: bool = False) -> Tensor:
        """A matrix product."""
        return rows @ (self.matrix.abs() if magnitudes else self.matrix).to(rows)


class Opaque(Made):
    """A function without a rule: products with its Jacobian are taken by autograd, through its graph.

    Args:
        name: name of the function.
        at: takes the products.
        like: the value that the function is evaluated at, with m entries per sample.
        price: multiplications of one product for one sample.
        source: the terms of the value.
    """

    sampled = True

    def __init__(self, name: str, at: Linearization, like: Tensor, price: float, source: "list[Term]") -> None:
        super().__init__(at.value.shape[1:].numel())
        self.name, self.price, self.source = name, price, source
        self._at, self._batch, self._shape = at, len(like), at.value.shape

    def settle(self, count: int) -> None:
        """Decide now how `count` products are batched, so that a checkpoint's second computation does as its first."""
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
    """One term of a Jacobian: P_rows diag(diagonal) P_columns^T (d base / dx).

    Attributes:
        base: what it refers to.
        diagonal: factors of the selected entries.
        rows: entries of the value; None for all in order.
        columns: entries of the base; None for all in order.
        summed: if the diagonal is a sum, the sum of the absolute values of its parts, which bounds its rounding. None
            otherwise, and where no bound is needed.
    """

    base: Base
    diagonal: Diagonal = None
    rows: Entries | None = None
    columns: Entries | None = None
    summed: Diagonal = None

    @property
    def magnitude(self) -> Diagonal:
        """A bound for the diagonal's entries before anything cancelled: `summed`, or their absolute values."""
        return self.diagonal.abs() if self.summed is None and self.diagonal is not None else self.summed


def take(matrix: Tensor, entries: Entries | None, dim: int) -> Tensor:
    """Select entries along a dimension of a matrix; None selects all."""
    return matrix if entries is None else entries.take(matrix, dim)


def is_number(diagonal: Diagonal) -> bool:
    """Whether a diagonal is one number for all entries, for the batch or per sample."""
    return diagonal is not None and (diagonal.ndim == 0 or (diagonal.ndim == 2 and diagonal.shape[1] == 1))


def entries_of(diagonal: Tensor, entries: Entries | None) -> Tensor:
    """Select entries of a diagonal; one that is a number for all entries stays as it is."""
    return diagonal if is_number(diagonal) else take(diagonal, entries, -1)


def put(tensor: Tensor, entries: Entries | None, size: int) -> Tensor:
    """The transpose of `take` for the last dimension: rows that go to the same entry are added up."""
    return tensor if entries is None else entries.put(tensor, size)


def product(a: Diagonal, b: Diagonal) -> Diagonal:
    """The product of two diagonals."""
    if a is None or b is None:
        return b if a is None else a
    return a * b


def scale(terms: list[Term], factor: Tensor) -> list[Term]:
    """The terms of `factor * v` for a diagonal factor."""
    scaled, products = [], {}
    for base, diagonal, rows, columns, summed in terms:
        key = id(diagonal), id(rows)
        if key not in products:  # equal diagonals stay one object, so that paths through them share a product
            products[key] = product(diagonal, entries_of(factor, rows))
        bound = None if summed is None else product(summed, entries_of(factor.abs(), rows))
        scaled.append(Term(base, products[key], rows, columns, bound))
    return scaled


def add(*sums: list[Term], bounded: bool = False) -> list[Term]:
    """The terms of a sum of values; terms with the same base, rows and columns are merged.

    Args:
        sums: the terms of each value.
        bounded: whether to keep a bound on what cancels (`Term.summed`).
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
    """Merge two matrices on the same value, M + P N with fewer rows in N, into one: subtracting a mean becomes part of the layer."""
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
    """The terms of M v for a matrix M `(n, m)` that the batch shares.

    If M has few rows and v is W u, they become one matrix: the mean of a layer's outputs is the row (1^T W) / m on its input.
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
    """How entries move: entry j of the result is v[index[j]], or a constant where index[j] < 0; v has `size` entries."""

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
    """A term after a movement: which of its entries remain, its new rows and its new columns. None if no entry remains."""
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

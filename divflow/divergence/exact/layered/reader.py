"""Reads a tape from input to output, and writes the Jacobian of each value as a sum of terms.

The terms of a value follow from those of its sources by the chain rule; each kind of step has a method for it.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from divflow.divergence.exact.layered.cuts import pulled
from divflow.divergence.exact.layered.jacobian import (
    Base,
    Opaque,
    Term,
    add,
    linear,
    move,
    scale,
)
from divflow.divergence.exact.layered.movements import broadcast, expansion, movements_of
from divflow.divergence.exact.layered.paths import bases_of
from divflow.operators.linearization import Linearization
from divflow.tape import NoRule, Tape, steps
from divflow.tape.opaque import counted, evaluated, price
from divflow.tape.operation import Operation, version
from divflow.tape.steps import Step
from divflow.tape.table import RULES
from divflow.tape.verify import Carried
from divflow.verification.mixing import mixed_by
from divflow.verification.products import reentrant_refused

__all__ = ["JacobianReader"]

# Largest matrix, in elements, that is formed for a sum, or for a linear map by applying the map to a basis.
_LARGEST_MATRIX = 2**22


class JacobianReader:
    """The terms of every value on a tape.

    Args:
        batch: number of samples k.
        differentiable: whether products through opaque functions keep their graph.
        verify: whether the result is to be compared with autograd. Opaque functions are then checked for mixing samples, and
            sums keep a bound on their rounding (`Term.summed`).
        read: whether terms are made at all; False records only the operations.

    Attributes:
        multiplications: in linear maps and opaque functions, for the whole batch.
        applied: multiplications spent on applying maps to a basis, to find their matrices.
        local: whether one of these maps is a convolution, for which the coloured method may be cheaper.
        opaque: for each function without a rule, the reason why only products with its Jacobian are known.
    """

    curved = False

    def __init__(self, batch: int, differentiable: bool, verify: bool = False, read: bool = True) -> None:
        self.batch, self.differentiable = batch, differentiable
        self._verify, self._read = verify, read
        self.multiplications = self.applied = 0.0
        self.local = False
        self.opaque: list[str] = []
        self._terms: list[list[Term]] = []
        self._graphs: list[tuple[Tensor, int]] = []

    def terms(self, tape: Tape, output: Tensor) -> list[Term]:
        """The Jacobian of the function's output; a constant has no terms.

        Raises:
            NoRule: the Jacobian is not known.
        """
        number = tape.output(output)
        if any(version(value) != number for value, number in self._graphs):
            raise NoRule("a change in place of a value that is known by its graph alone")
        return [] if number is None else self._terms[number]

    def carry(
        self, tape: Tape, output: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Carried | None:
        """w^T J v for weights w at the output and directions v at the roots, with a bound on the rounding of the sum.

        None for a constant output.
        """
        number = tape.output(output)
        if number is None:
            return None
        terms, row = self._terms[number], weights.reshape(self.batch, 1, -1)
        with torch.no_grad():
            rows, magnitudes = (pulled(terms, bases_of(terms), r, m) for r, m in ((row, False), (row.abs(), True)))
        found, sizes = [weights.new_zeros(len(first[0]), 1)], [weights.new_zeros(())]
        for root, directions in enumerate(first):
            name = id(self._terms[root][0].base)
            if name in rows:
                along = directions.reshape(len(directions), self.batch, -1)
                found.append((rows[name][:, 0] * along).flatten(1))
                sizes.append((magnitudes[name][:, 0] * along.abs()).sum())
        return Carried(torch.cat(found, dim=1), None, torch.stack(sizes).sum())

    def learn(self, number: int, step: Step, value: Tensor) -> None:
        """Add the terms of a step's value.

        Raises:
            NoRule: its Jacobian is no such sum, or the value has no batch dimension.
        """
        if not self._read and step.sources:
            raise NoRule("it is not asked for")
        if value.ndim == 0 or value.shape[0] != self.batch:
            if isinstance(step.kind, steps.Moved | steps.Mapped | steps.Product | steps.Reduced):
                raise NoRule(f"{step.kind.operation.name} over the batch")
            raise NoRule(f"a value of shape {tuple(value.shape)}, without the batch's dimension,")
        self._terms.append(self._of(step, value))

    def _of(self, step: Step, value: Tensor) -> list[Term]:
        sources = [self._terms[source] for source in step.sources]
        return _WAYS[type(step.kind)](self, step.kind, sources, value)

    def _root(self, kind: steps.Root, sources: list[list[Term]], value: Tensor) -> list[Term]:
        return [Term(Base(value.shape[1:].numel()))]

    def _copied(self, kind: steps.Copied, sources: list[list[Term]], value: Tensor) -> list[Term]:
        return sources[0]

    def _moved(self, kind: steps.Moved, sources: list[list[Term]], value: Tensor) -> list[Term]:
        movements = movements_of(kind.operation, kind.places, self.batch)[kind.number]
        parts = [move(terms, movement) for terms, movement in zip(sources, movements, strict=True)]
        return parts[0] if len(parts) == 1 else add(*parts, bounded=self._verify)

    def _scaled(self, kind: steps.Scaled, sources: list[list[Term]], value: Tensor) -> list[Term]:
        parts = []
        for terms, shape, slope in zip(sources, kind.shapes, kind.slopes, strict=True):
            moved = broadcast(terms, shape, value.shape)
            parts.append(moved if slope is None else scale(moved, _diagonal(slope, value, kind.shared)))
        return parts[0] if len(parts) == 1 else add(*parts, bounded=self._verify)

    def _mapped(self, kind: steps.Mapped, sources: list[list[Term]], value: Tensor) -> list[Term]:
        (terms,) = sources
        op, x, matrix = kind.operation, kind.operation.tensors[kind.place], kind.matrix
        if matrix is None or matrix.ndim != 2 or x.ndim != 2:
            size = x.shape[1:].numel()
            if size * value.shape[1:].numel() > _LARGEST_MATRIX:
                if op.name in RULES:
                    raise NoRule(f"{op.name} of this size")
                return self._by_products(op, (kind.place,), [terms], f"{op.name} of this size")
            found = _matrix_of(kind, self.batch, value)
            if found is None:
                why = f"{op.name} without a matrix that the batch shares"
                return self._by_products(op, (kind.place,), [terms], why)
            matrix, operations = found
            self.applied += operations * (size + 1)
            self.local |= op.name.startswith("conv")
            self.multiplications += self.batch * operations
        else:
            self.multiplications += self.batch * matrix.numel()
        if torch.is_autocast_enabled(x.device.type):
            matrix = matrix.to(torch.get_autocast_dtype(x.device.type))
        return linear(matrix, terms)

    def _reduced(self, kind: steps.Reduced, sources: list[list[Term]], value: Tensor) -> list[Term]:
        (terms,) = sources
        if 0 in kind.dims:
            raise NoRule(f"{kind.operation.name} over the batch")
        event, dims = kind.shape[1:], tuple(dim - 1 for dim in kind.dims)
        left = math.prod(size for dim, size in enumerate(event) if dim not in dims)
        if left * event.numel() > _LARGEST_MATRIX:
            raise NoRule("a sum of this size")
        slope = kind.slope
        weight = 1.0 if slope is None or isinstance(slope, Tensor) else slope
        weights = _sums(event, dims, weight, kind.operation.tensors[0].dtype, value.device)
        self.multiplications += self.batch * weights.shape[1]
        return linear(weights, scale(terms, slope.reshape(self.batch, -1)) if isinstance(slope, Tensor) else terms)

    def _standardized(self, kind: steps.Standardized, sources: list[list[Term]], value: Tensor) -> list[Term]:
        """dz/du = (I - 1 1^T / n - z z^T / n) / sigma: a diagonal, and a matrix of rank two for each group of n entries."""
        (terms,) = sources
        if 0 in kind.dims:
            raise NoRule("a standardization over the batch")
        event, dims = kind.shape[1:], tuple(dim - 1 for dim in kind.dims)
        kept = torch.Size(1 if dim in dims else size for dim, size in enumerate(event))
        if kept.numel() * event.numel() > _LARGEST_MATRIX:
            raise NoRule("a standardization of this size")
        means = _sums(event, dims, kept.numel() / max(1, event.numel()), value.dtype, value.device)
        self.multiplications += 2 * self.batch * means.shape[1]
        spread, scaled = expansion(kept, event), _diagonal(kind.scale, value, False)
        z = value.reshape(self.batch, event.numel())
        if kind.centred:
            terms = add(terms, scale(move(linear(means, terms), spread), _minus(value.dtype)), bounded=self._verify)
        along = move(linear(means, scale(terms, z)), spread)
        return add(scale(terms, scaled), scale(along, -(scaled * z)), bounded=self._verify)

    def _product(self, kind: steps.Product, sources: list[list[Term]], value: Tensor) -> list[Term]:
        return self._by_products(kind.operation, kind.places, sources, f"{kind.operation.name} of several values of x")

    def _by_products(self, op: Operation, places: Sequence[int], sources: list[list[Term]], why: str) -> list[Term]:
        """The terms of an operation whose matrix is not formed: products with its Jacobian are taken by autograd."""
        operands = [*{id(op.tensors[i]): op.tensors[i] for i in places}.values()]
        value, points = evaluated(op, operands, self.differentiable)
        unique = {id(op.tensors[i]): terms for i, terms in zip(places, sources, strict=True)}
        kind = steps.Opaque(op.name, why, value, points, price(op, value, operands))
        return self._opaque(kind, [*unique.values()], value)

    def _opaque(self, kind: steps.Opaque, sources: list[list[Term]], value: Tensor) -> list[Term]:
        if self._verify:
            for point in kind.points:
                with reentrant_refused():
                    mixed = mixed_by(kind.value, point, 1)
                if mixed is not None:
                    raise NoRule(f"{kind.name} mixes the samples of a batch")
        self.multiplications += self.batch * kind.price / 2
        self.opaque.append(kind.why)
        self._graphs.append((kind.value, version(kind.value)))
        terms = []
        for point, source in zip(kind.points, sources, strict=True):
            if point.ndim == 0 or len(point) != self.batch:
                raise NoRule(f"{kind.name} of a value without the batch's dimension")
            at = Linearization(kind.value, point, self.differentiable)
            if source:
                terms.append(Term(Opaque(kind.name, at, point, kind.price, source)))
        return terms


_WAYS: dict[type, Callable[..., list[Term]]] = {
    steps.Root: JacobianReader._root,
    steps.Copied: JacobianReader._copied,
    steps.Moved: JacobianReader._moved,
    steps.Scaled: JacobianReader._scaled,
    steps.Mapped: JacobianReader._mapped,
    steps.Reduced: JacobianReader._reduced,
    steps.Standardized: JacobianReader._standardized,
    steps.Product: JacobianReader._product,
    steps.Opaque: JacobianReader._opaque,
}


@functools.cache
def _minus(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(-1.0, dtype=dtype, device="cpu")


def _diagonal(slope: Tensor | float, value: Tensor, may_share: bool) -> Tensor:
    """Reshape a slope to a `Diagonal` of the flattened event; one for the whole batch where `may_share` allows it."""
    if not isinstance(slope, Tensor):
        return torch.as_tensor(slope, dtype=value.dtype, device="cpu")
    if not slope.is_floating_point():
        slope = slope.to(value.dtype)
    if not may_share and slope.ndim == 2 and slope.shape == value.shape:
        return slope
    event = value.shape[1:]
    if may_share and slope.numel() == 1:
        return slope.reshape(())
    # The rows of an expanded tensor are equal, but with a gradient each of them has its own.
    expanded = not slope.requires_grad and slope.ndim > 0 and slope.stride(0) == 0
    if may_share and (slope.ndim < value.ndim or slope.shape[0] == 1 or expanded):
        row = slope[0] if slope.ndim == value.ndim else slope
        return row.expand(event).reshape(event.numel())
    if slope.ndim == value.ndim and slope.shape == (value.shape[0], *[1] * len(event)):
        return slope.reshape(value.shape[0], 1)
    return slope.expand(value.shape).reshape(value.shape[0], event.numel())


def _matrix_of(kind: steps.Mapped, batch: int, value: Tensor) -> tuple[Tensor, float] | None:
    """The matrix of a linear map, and the multiplications that the map takes for one sample.

    Column j is f(e_j) - f(0), for all j in one call whose batch is the basis. None if the map can't be called so.
    """
    op, x = kind.operation, kind.operation.tensors[kind.place]
    _refuse_batch(op, x)
    event = x.shape[1:]
    size = event.numel()
    # The last points are zero. The number of points differs from the batch, so that a constant with a row per sample does not fit.
    count = size + 1 if size + 1 != batch else size + 2
    with torch.autocast(x.device.type, enabled=False):
        points = torch.eye(count, size, dtype=x.dtype, device=x.device).view(count, *event)
        try:
            images, operations = counted(op, lambda: op.at_places({kind.place: points}))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return None
    if not isinstance(images, Tensor) or images.shape != (count, *value.shape[1:]):
        return None
    return (images[:size] - images[size]).reshape(size, value.shape[1:].numel()).mT, operations / count


def _refuse_batch(op: Operation, x: Tensor) -> None:
    """Refuse `cumsum` and `diff` along the batch dimension."""
    if op.name in ("cumsum", "diff"):
        position = 2 if op.name == "diff" else 1
        dim = op.kwargs.get("dim", op.args[position] if len(op.args) > position else -1)
        if not isinstance(dim, int) or dim % max(x.ndim, 1) == 0:
            raise NoRule(f"{op.name} over the batch")


@functools.lru_cache(maxsize=32)
def _sums(event: torch.Size, dims: tuple[int, ...], weight: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix `(m, n)` that sums an event's n entries along `dims`, each times `weight`."""
    kept = [1 if dim in dims else size for dim, size in enumerate(event)]
    m, n = math.prod(kept), event.numel()
    with torch.inference_mode(False), torch.no_grad():
        place = torch.arange(m, device=device).view(kept).expand(event).reshape(n)
        matrix = torch.zeros(m, n, dtype=dtype, device=device)
        matrix[place, torch.arange(n, device=device)] = weight
        return matrix

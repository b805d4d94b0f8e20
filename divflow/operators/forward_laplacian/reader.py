"""Reading a tape: derivatives along directions of the roots, to second order, of what it holds.

The tape is made once, with the values; jets are sent along it afterwards, as many at a time as memory allows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from divflow.operators.forward_laplacian.jet import Jet, chained, linear, multilinear, summed
from divflow.tape import NoRule, Tape, steps
from divflow.tape.operation import tensors_in, version
from divflow.tape.steps import Step
from divflow.tape.table import CHOOSING, JOINING, RESHAPING
from divflow.tape.verify import Carried

__all__ = ["JetReader"]

# What takes as long for an entry of an elementwise function as so many multiplications of a matrix product.
_ELEMENT = 16


class JetReader:
    """Jets of the values on a tape.

    Attributes:
        multiplications: of the value, for the whole batch, and what takes as long, without those of the opaque functions.
        through: those of one product through each of the opaque functions.
        opaque: why nothing else is known of these.
    """

    curved = True

    def __init__(self) -> None:
        self.multiplications = self.through = 0.0
        self.opaque: list[str] = []
        self._graphs: list[tuple[Tensor, int]] = []

    def learn(self, number: int, step: Step, value: Tensor) -> None:
        """Count a step; jets come later."""
        kind = step.kind
        if isinstance(kind, steps.Opaque):
            self.through += kind.price * max(1, len(value) if value.ndim else 1)
            self.opaque.append(kind.why)
            self._graphs.append((kind.value, version(kind.value)))
        elif isinstance(kind, steps.Mapped) and kind.matrix is not None:
            self.multiplications += value.numel() * kind.matrix.shape[-1]
        elif isinstance(kind, steps.Mapped | steps.Product | steps.Scaled | steps.Reduced | steps.Standardized):
            self.multiplications += _ELEMENT * value.numel()

    def jet(self, tape: Tape, output: Tensor, seeds: Sequence[Jet]) -> Jet | None:
        """The jet of an output for jets of the roots; None if it does not depend on them.

        Raises:
            NoRule: it is not known.
        """
        goal = tape.output(output)
        if any(version(value) != number for value, number in self._graphs):
            raise NoRule("a change in place of a value that is known by its graph alone")
        if goal is None:
            return None
        last = {goal: goal}
        for number in range(goal, len(seeds) - 1, -1):
            if number in last:
                for source in tape.steps[number].sources:
                    last.setdefault(source, number)
        jets = dict(enumerate(seeds))
        for number in range(len(seeds), goal + 1):
            if number in last:
                step = tape.steps[number]
                shapes = [tape.steps[source].shape for source in step.sources]
                try:
                    jets[number] = _pushed(step, [jets[source] for source in step.sources], shapes)
                except (torch.OutOfMemoryError, NoRule):
                    raise
                except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                    raise NoRule(f"its derivatives fail: {error}".splitlines()[0]) from error
                for source in {source for source in step.sources if last[source] == number}:
                    jets.pop(source, None)
        return jets[goal].expand(tape.steps[goal].shape)

    def carry(
        self, tape: Tape, output: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Carried | None:
        """The product of weights with the derivatives of an output along directions of the roots."""
        jet = self.jet(tape, output, [Jet(*rows) for rows in zip(first, second, strict=True)])
        if jet is None:
            return None
        bends = None if jet.second is None else (jet.second * weights).flatten(1)
        return Carried((jet.first * weights).flatten(1), bends)


def _pushed(step: Step, jets: list[Jet], shapes: list[torch.Size]) -> Jet:
    """The jet of a step's value, of those of its sources."""
    kind = step.kind
    if isinstance(kind, steps.Scaled):
        return chained(jets, kind.slopes, kind.curvatures, len(step.shape))
    if isinstance(kind, steps.Mapped):
        return _mapped(kind, jets[0], shapes[0])
    if isinstance(kind, steps.Moved):
        return _moved(kind, step, jets, shapes)
    if isinstance(kind, steps.Copied):
        return jets[0].map(lambda rows: rows.to(kind.device, kind.dtype))
    if isinstance(kind, steps.Reduced):
        return _reduced(kind, jets[0], step.shape)
    if isinstance(kind, steps.Standardized):
        return _standardized(kind, jets[0].expand(kind.shape))
    if isinstance(kind, steps.Product):
        full = {i: jet.expand(shape) for i, jet, shape in zip(kind.places, jets, shapes, strict=True)}
        return multilinear(kind.operation.at_places, full)
    if isinstance(kind, steps.Opaque):
        return _through(kind, [jet.expand(shape) for jet, shape in zip(jets, shapes, strict=True)])
    raise AssertionError("a root is made from nothing")


def _mapped(kind: steps.Mapped, jet: Jet, shape: torch.Size) -> Jet:
    matrix = kind.matrix
    if matrix is not None:
        return jet.map(lambda rows: rows.expand(*rows.shape[:-1], shape[-1]) @ matrix.mT)

    def one(row: Tensor) -> Tensor:
        return kind.operation.at_places({kind.place: row})

    def all_rows(rows: Tensor) -> Tensor:
        try:
            return vmap(one)(rows)
        except RuntimeError:  # an operator without a rule for batches
            return torch.stack([one(row) for row in rows])

    return linear(all_rows, [jet.expand(shape)])


def _moved(kind: steps.Moved, step: Step, jets: list[Jet], shapes: list[torch.Size]) -> Jet:
    op, result = kind.operation, step.shape
    if len(jets) == 1 and op.name in RESHAPING and len(result) and shapes[0][:1] == result[:1]:
        # The same entries in the same order. What the samples share, such as the tangents of x itself, stays shared.
        event = shapes[0][1:]
        return jets[0].map(lambda rows: rows.expand(*rows.shape[:2], *event).reshape(*rows.shape[:2], *result[1:]))
    if op.name in JOINING:
        joined = _joined(kind, result)
        if joined is not None:
            return linear(joined, jets)
    indices = op.name in CHOOSING
    constants = (i for i, z in enumerate(op.tensors) if i not in kind.places and (z.is_floating_point() or not indices))
    zeros = {i: torch.zeros_like(op.tensors[i]) for i in constants}

    def moved(*rows: Tensor) -> Tensor:
        return tensors_in(op.at_places(zeros | dict(zip(kind.places, rows, strict=True))))[kind.number]

    return linear(vmap(moved), [jet.expand(shape) for jet, shape in zip(jets, shapes, strict=True)])


def _joined(kind: steps.Moved, result: torch.Size) -> Callable[..., Tensor] | None:
    """What puts rows one after another, where it is not along the batch: what the samples share stays shared."""
    op = kind.operation
    options: dict[str, Any] = dict(zip(("tensors", "dim"), op.args, strict=False)) | op.kwargs
    dim, tensors = options.get("dim", 0) % max(1, len(result)), op.tensors
    if dim == 0 or "out" in options or any(tensor.ndim != len(result) for tensor in tensors):
        return None

    def joined(*rows: Tensor) -> Tensor:
        batch, given = max(row.shape[1] for row in rows), dict(zip(kind.places, rows, strict=True))
        parts = (given.get(i, rows[0].new_zeros(1)) for i in range(len(tensors)))
        sizes = ((rows[0].shape[0], batch, *tensor.shape[1:]) for tensor in tensors)
        return torch.cat([part.expand(size) for part, size in zip(parts, sizes, strict=True)], dim + 1)

    return joined


def _reduced(kind: steps.Reduced, jet: Jet, result: torch.Size) -> Jet:
    shared = kind.curvature is None and 0 not in kind.dims and not isinstance(kind.slope, Tensor)
    full = jet.map(lambda rows: rows.expand(*rows.shape[: 1 + shared], *kind.shape[shared:]))
    dims = [dim + 1 for dim in kind.dims]

    def along(rows: Tensor) -> Tensor:
        weighted = rows if kind.slope is None else rows * kind.slope
        total = weighted.sum(dims) if dims else weighted
        return total.reshape(*total.shape[: 1 + shared], *result[shared:])

    pushed = full.map(along)
    if kind.curvature is None:
        return pushed
    bent = kind.curvature(full.first).reshape(1, *result)
    return Jet(pushed.first, bent if pushed.second is None else pushed.second + bent)


def _standardized(kind: steps.Standardized, jet: Jet) -> Jet:
    """With c = u' - mean u' and a = mean z c: z' = (c - a z) / sigma, and z'' of u' is (3 a^2 z - 2 a c - z mean c^2) / sigma^2."""
    dims, z, scale = [dim + 1 for dim in kind.dims], kind.value, kind.scale

    def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
        c = rows - rows.mean(dims, keepdim=True) if kind.centred else rows
        return c, (z * c).mean(dims, keepdim=True)

    c, a = parts(jet.first)
    bent = (3 * a * a * z - 2 * a * c - z * (c * c).mean(dims, keepdim=True)).sum(dim=0, keepdim=True) * scale * scale
    if jet.second is not None:
        d, b = parts(jet.second)
        bent = bent + scale * (d - b * z)
    return Jet(scale * (c - a * z), bent)


def _through(kind: steps.Opaque, jets: list[Jet]) -> Jet:
    """By the function's own products: w^T J is linear in w, and differentiated in it; and that once more.

    Raises:
        NoRule: its second derivatives are hidden from autograd.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        firsts, bends = [], []
        product = _Forward(kind.value, kind.points, kind.name)
        for i in range(len(jets[0].first)):
            directions = [jet.first[i] for jet in jets]
            slope = product(directions, create_graph=True)
            firsts.append(slope)
            bends.append(
                _Forward(slope, kind.points, kind.name)(directions, create_graph) if slope.requires_grad else None
            )
        if any(jet.second is not None for jet in jets):
            zeros = [torch.zeros_like(jet.first[0]) if jet.second is None else jet.second[0] for jet in jets]
            bends.append(product(zeros, create_graph))
    second = [bend for bend in bends if bend is not None]
    jet = Jet(torch.stack(firsts), summed(second)[None] if second else None)
    return jet if create_graph else jet.map(Tensor.detach)


class _Forward:
    """Products J u with the Jacobian of a value in some points.

    Args:
        value: with its graph.
        points: that it starts from.
        name: of the function, for messages.
    """

    def __init__(self, value: Tensor, points: Sequence[Tensor], name: str) -> None:
        self._dual = torch.zeros_like(value, requires_grad=True)
        self._name = name
        self._slopes = torch.autograd.grad(value, points, self._dual, create_graph=True, allow_unused=True)

    def __call__(self, directions: Sequence[Tensor], create_graph: bool) -> Tensor:
        """The sum over the points of J u."""
        pairs = [(s, u) for s, u in zip(self._slopes, directions, strict=True) if s is not None]
        if any(not slope.requires_grad for slope, _ in pairs):
            raise NoRule(f"the backward of {self._name} is hidden from autograd")
        if not pairs:
            return torch.zeros_like(self._dual)
        along = summed([(slope * direction).sum() for slope, direction in pairs])
        (product,) = torch.autograd.grad(along, self._dual, create_graph=create_graph, retain_graph=True)
        return product

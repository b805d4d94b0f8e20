"""How each torch operation carries jets: what moves entries, linear and multilinear maps, functions written out."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from divflow.divergence.layered import NoRule
from divflow.divergence.layered import rules as layered
from divflow.divergence.layered.operation import Operation, tensors_in
from divflow.laplacian.elementwise import elementwise
from divflow.laplacian.jet import Jet, inner, linear, multilinear
from divflow.laplacian.tape import Rule, Tape, at_places

__all__ = ["RULES"]


def _constant(tape: Tape, op: Operation) -> Any:
    """What only shape, dtype and device, or the detached value, are taken for."""
    return op()


def _same_entries(tape: Tape, op: Operation) -> Any:
    """Copies and conversions of a value."""
    result, source = op(), op.tensors[0]
    if result is source or not isinstance(result, Tensor) or not tape.depends(source):
        return result
    if result.is_complex() or not result.is_floating_point():
        return result
    return tape.learn(result, [source], lambda jet: jet.map(lambda rows: rows.to(result)))


def _linear(tape: Tape, op: Operation) -> Any:
    """What is linear in all of its tensors together: movements of entries, sums, the joining of several tensors."""
    result = op()
    places = [i for i, tensor in enumerate(op.tensors) if tape.depends(tensor)]
    operands, shapes = [op.tensors[i] for i in places], [op.tensors[i].shape for i in places]
    constants = (i for i, tensor in enumerate(op.tensors) if tensor.is_floating_point() and i not in places)
    zeros = {i: torch.zeros_like(op.tensors[i]) for i in constants}
    outputs = tensors_in(result)
    for number, output in enumerate(outputs):

        def push(*jets: Jet, number: int = number) -> Jet:
            def moved(*rows: Tensor) -> Tensor:
                return tensors_in(at_places(op, zeros | dict(zip(places, rows, strict=True))))[number]

            return linear(vmap(moved), [jet.expand(shape) for jet, shape in zip(jets, shapes, strict=True)])

        tape.learn(output, operands, push)
    return result


def _reshape(tape: Tape, op: Operation) -> Tensor:
    """The same entries in the same order. What the samples share, such as the tangents of x itself, stays shared."""
    result, (x, *others) = op(), op.tensors
    if not tape.depends(x) or any(map(tape.depends, others)) or result.ndim == 0 or result.shape[:1] != x.shape[:1]:
        return _linear(tape, op)
    event, shape = x.shape[1:], result.shape[1:]

    def push(jet: Jet) -> Jet:
        return jet.map(lambda rows: rows.expand(*rows.shape[:2], *event).reshape(*rows.shape[:2], *shape))

    return tape.learn(result, [x], push)


def _join(tape: Tape, op: Operation) -> Tensor:
    """Several tensors, one after another; where it is not along the batch, what the samples share stays shared."""
    result, (tensors, *rest) = op(), op.args
    dim = op.kwargs.get("dim", rest[0] if rest else 0) % max(1, result.ndim)
    if dim == 0 or "out" in op.kwargs or any(tensor.ndim != result.ndim for tensor in tensors):
        return _linear(tape, op)
    places = [i for i, tensor in enumerate(tensors) if tape.depends(tensor)]

    def joined(*rows: Tensor) -> Tensor:
        batch, given = max(row.shape[1] for row in rows), dict(zip(places, rows, strict=True))
        parts = (given.get(i, rows[0].new_zeros(1)) for i in range(len(tensors)))
        shapes = ((rows[0].shape[0], batch, *tensor.shape[1:]) for tensor in tensors)
        return torch.cat([part.expand(shape) for part, shape in zip(parts, shapes, strict=True)], dim + 1)

    return tape.learn(result, [tensors[i] for i in places], lambda *jets: linear(joined, jets))


def _multilinear(tape: Tape, op: Operation) -> Tensor:
    """What is linear in each of its tensors."""
    value = op()
    places = [i for i, tensor in enumerate(op.tensors) if tape.depends(tensor)]
    operands = [op.tensors[i] for i in places]

    def push(*jets: Jet) -> Jet:
        full = {i: jet.expand(op.tensors[i].shape) for i, jet in zip(places, jets, strict=True)}
        return multilinear(lambda new: at_places(op, new), full)

    return tape.learn(value, operands, push)


def _layer(tape: Tape, op: Operation) -> Tensor:
    """A multilinear map of input and weight, plus a bias."""
    parts = dict(zip(("input", "weight", "bias"), op.args, strict=False)) | op.kwargs
    x, weight, bias = parts["input"], parts["weight"], parts.get("bias")
    if tape.depends(bias):
        raise NoRule(f"{op.name} with a bias that depends on x")
    if op.name == "linear" and not tape.depends(weight):
        value, width = op(), x.shape[-1:]

        def push(jet: Jet) -> Jet:
            return jet.map(lambda rows: F.linear(rows.expand(*rows.shape[:-1], *width), weight))

        return tape.learn(value, [x], push)
    kwargs = {key: item for key, item in op.kwargs.items() if key != "bias"}
    plain = Operation(op.func, op.name, (*op.args[:2], None, *op.args[3:])[: len(op.args)], kwargs, [], op.summary)
    plain = plain._replace(tensors=[tensor for tensor in op.tensors if tensor is not bias])
    return _multilinear(tape, plain) if bias is None else _shifted(tape, op, plain)


def _shifted(tape: Tape, op: Operation, plain: Operation) -> Tensor:
    """What differs from a function by a constant."""
    before = _multilinear(tape, plain)
    return tape.alias(op(), before)


def _matmul(tape: Tape, op: Operation) -> Tensor:
    if op.kwargs or tape.depends(op.args[1]) or op.args[1].ndim != 2 or op.args[0].ndim < 2:
        return _multilinear(tape, op)
    x, matrix = op.args
    width = x.shape[-1:]
    return tape.learn(op(), [x], lambda jet: jet.map(lambda rows: rows.expand(*rows.shape[:-1], *width) @ matrix))


def _logarithm_of_determinant(tape: Tape, op: Operation) -> Any:
    """The derivative of log |det A| along A' is tr(A^-1 A'), and the second one -tr(A^-1 A' A^-1 A')."""
    result, (matrix,) = op(), op.tensors

    def push(jet: Jet) -> Jet:
        full = jet.expand(matrix.shape)
        rows = torch.linalg.solve(matrix, full.first)
        second = -inner(rows, rows.mT).sum(dim=(-2, -1))
        if full.second is not None:
            second = second + _trace(torch.linalg.solve(matrix, full.second))
        return Jet(_trace(rows), second)

    *sign, logarithm = tensors_in(result)
    for value in sign:  # constant, but of a graph
        tape.learn(value, [matrix], lambda jet: Jet(jet.first.new_zeros(len(jet.first), *matrix.shape[:-2])))
    tape.learn(logarithm, [matrix], push)
    return result


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


# Functions written out by others, which have rules.


def _written_out(function: Callable[..., Tensor]) -> Rule:
    """The rule of an operation that takes the arguments of a function made of others."""

    def rule(tape: Tape, op: Operation) -> Tensor:
        with torch.enable_grad(), tape:
            return function(*op.args, **op.kwargs)

    return rule


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    largest = input.detach().amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    total = (input - largest).exp().sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.sum(dim)


def _log_softmax(input: Tensor, dim: int, *rest: object, **options: object) -> Tensor:
    # Its third argument is a dtype in torch's own function, and the fourth in that of torch.nn.functional.
    if any(isinstance(option, torch.dtype) for option in (*rest, *options.values())):
        raise NoRule("softmax to another dtype")
    return input - _logsumexp(input, dim, keepdim=True)


def _softmax(input: Tensor, dim: int, *rest: object, **options: object) -> Tensor:
    return _log_softmax(input, dim, *rest, **options).exp()


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    normal = centred / ((centred * centred).mean(dims, keepdim=True) + eps).sqrt()
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * (mat1 @ mat2)


def _prod(input: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    total = functools.reduce(torch.mul, input.unbind(dim))
    return total.unsqueeze(dim) if keepdim else total


def _norm(tape: Tape, op: Operation) -> Tensor:
    """The Euclidean norm, whose derivatives at zero are zero by autograd's convention."""
    names = ("input", "p", "dim", "keepdim") if op.name == "norm" else ("x", "ord", "dim", "keepdim")
    options = dict(zip(names, op.args, strict=False)) | op.kwargs
    x, order = options.pop(names[0], op.tensors[0]), options.pop(names[1], 2)
    dim, keepdim = options.pop("dim", None), options.pop("keepdim", False)
    if order not in (2, None, "fro") or any(option is not None for option in options.values()):
        raise NoRule(f"{op.name} of another kind")
    if op.name == "linalg_norm" and order is not None and (dim is None or not isinstance(dim, int)) and x.ndim > 1:
        raise NoRule("the norm of a matrix")
    with torch.enable_grad(), tape:
        squares = (x * x).sum(keepdim=keepdim) if dim is None and keepdim else _sum(x * x, dim, keepdim)
    value = op()
    zero = value == 0
    length = torch.where(zero, 1.0, value)
    slope = torch.where(zero, 0.0, 0.5 / length)
    curvature = torch.where(zero, 0.0, -0.25 / length**3)

    def push(jet: Jet) -> Jet:
        second = curvature * inner(jet.first, jet.first)
        return Jet(slope * jet.first, second if jet.second is None else slope * jet.second + second)

    return tape.learn(value, [squares], push)


def _sum(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    return x.sum() if dim is None else x.sum(dim, keepdim=keepdim)


def _variance(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    if isinstance(dim, bool):
        raise NoRule("a variance over the batch")
    dims = range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    count = math.prod(input.shape[d] for d in dims)
    less = int(unbiased) if correction is None else correction
    centred = input - input.mean(tuple(dims), keepdim=True)
    return (centred * centred).sum(tuple(dims), keepdim=keepdim) / (count - less)


def _deviation(*args: Any, **kwargs: Any) -> Tensor:
    return _variance(*args, **kwargs).sqrt()


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _those_like(name: str) -> list[str]:
    """The operations that the layered method follows as it does another."""
    return [other for other, rule in layered.RULES.items() if rule is layered.RULES[name]]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_those_like("exp"), elementwise),
    **dict.fromkeys(_those_like("reshape"), _linear),
    **dict.fromkeys(_those_like("clone"), _same_entries),
    **dict.fromkeys(_those_like("detach"), _constant),
    **_named(_reshape, "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as"),
    **_named(_join, "cat concat concatenate"),
    **_named(_linear, "sum mean cumsum diff trace tril triu"),
    **_named(_matmul, "matmul mm"),
    **_named(
        _multilinear, "bmm mv dot vdot inner outer ger einsum tensordot kron cross linalg_cross vecdot linalg_vecdot"
    ),
    **_named(_layer, "linear conv1d conv2d conv3d"),
    **_named(_norm, "norm linalg_norm linalg_vector_norm"),
    **_named(_logarithm_of_determinant, "slogdet logdet linalg_slogdet"),
    "glu": _written_out(_glu),
    "logsumexp": _written_out(_logsumexp),
    "softmax": _written_out(_softmax),
    "log_softmax": _written_out(_log_softmax),
    "layer_norm": _written_out(_layer_norm),
    "normalize": _written_out(_normalize),
    "addmm": _written_out(_addmm),
    "prod": _written_out(_prod),
    "var": _written_out(_variance),
    "std": _written_out(_deviation),
}

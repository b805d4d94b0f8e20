"""How each torch operation carries Jacobians: movements of entries, elementwise functions, linear maps.

A rule evaluates the operation and tells the trace the Jacobian of the result. Rules are found by the name of the
operation, which is the same for a function of torch, a method of Tensor and a function of torch.nn.functional.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from divflow.divergence.layered.jacobian import Movement, NoRule, Term, add, linear, move, scale
from divflow.divergence.layered.operation import Operation, tensors_in
from divflow.divergence.layered.reductions import mean_or_sum, reduction
from divflow.divergence.layered.values import Values
from divflow.verification.recent import Recent

__all__ = ["CHOOSING", "RULES", "SAME_EVERYWHERE"]

# Elements of the matrix of a linear map that has to be found by applying it to a basis.
_LARGEST_MATRIX = 2**22


# Movements: results whose entries are entries of the arguments.


def _movement(trace: Values, op: Operation) -> Any:
    operands = [tensor for tensor in op.tensors if trace.depends(tensor)]
    sources = [trace.terms(operand) for operand in operands]
    found = _MOVEMENTS.get(op.summary)
    if found is None:
        found = _find_movements(trace, op)
        _MOVEMENTS.keep(op.summary, found)
    result = op()
    for tensor, movements in zip(tensors_in(result), found, strict=True):
        parts = [move(terms, movement) for terms, movement in zip(sources, movements, strict=True)]
        trace.learn(tensor, parts[0] if len(parts) == 1 else add(*parts))
    return result


_MOVEMENTS: Recent[list[list[Movement]]] = Recent(1024)


def _find_movements(trace: Values, op: Operation) -> list[list[Movement]]:
    """Where each entry of an operation's results comes from, in each operand: torch itself moves numbered entries.

    They are moved twice, under other numbers, so that a result which is none of them is known for a constant.
    """
    batch, sizes = trace.batch, [tensor.shape[1:].numel() for tensor in op.tensors if trace.depends(tensor)]
    total = max(1, sum(sizes))
    shift = batch * total

    def moved(start: int) -> list[Tensor]:
        offset = start

        def numbered(tensor: Tensor) -> Tensor:
            nonlocal offset
            if trace.depends(tensor):
                event = tensor.shape[1:]
                entries = torch.arange(offset, offset + event.numel(), device="cpu").view(1, *event)
                offset += event.numel()
                return entries + total * torch.arange(batch, device="cpu").view(batch, *[1] * len(event))
            return torch.full(tensor.shape, -1, device="cpu") if tensor.is_floating_point() else tensor.cpu()

        return tensors_in(op.at(numbered))

    found = []
    for tensor, again in zip(moved(0), moved(shift), strict=True):
        if tensor.ndim == 0 or tensor.shape[0] != batch:
            raise NoRule(f"{op.name} over the batch")
        rows, others = (entries.reshape(batch, entries.shape[1:].numel()).long() for entries in (tensor, again))
        entries = others - rows == shift
        if not (entries | (others == rows)).all():
            raise NoRule(f"{op.name} that chooses by what it moves")
        index = torch.where(entries, rows % total, -1)
        if ((rows // total != torch.arange(batch, device="cpu")[:, None]) & entries).any() or (
            index != index[:1]
        ).any():
            raise NoRule(f"{op.name} between samples")
        sources, offset, parts = index[0].numpy(), 0, []
        for size in sizes:
            inside = (sources >= offset) & (sources < offset + size)
            parts.append(Movement(size, np.where(inside, sources - offset, -1)))
            offset += size
        found.append(parts)
    return found


def _same_entries(trace: Values, op: Operation) -> Any:
    """Copies and conversions of a value."""
    result, source = op(), op.tensors[0]
    if result is source or not isinstance(result, Tensor) or not trace.depends(source):
        return result
    return trace.learn(result, trace.terms(source)) if not _is_discrete(result) else result


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _constant(trace: Values, op: Operation) -> Any:
    """What only shape, dtype and device, or the detached value, are taken for."""
    return op()


# Elementwise functions, of any number of arguments that are broadcast together.


def _elementwise(trace: Values, op: Operation) -> Tensor:
    if op.kwargs.get("inplace") or op.name.endswith("_"):
        return _in_place(trace, op)
    if "inplace" in op.kwargs:
        op = op._replace(kwargs={key: value for key, value in op.kwargs.items() if key != "inplace"})
    if "out" in op.kwargs:
        raise NoRule(f"{op.name} with out")
    operands = [tensor for tensor in op.tensors if trace.depends(tensor)]
    for tensor in operands:
        trace.terms(tensor)
    shared = False
    if not op.kwargs and len(op.args) == 1 and op.name in _DERIVATIVES:
        value = op()
        derivatives = [_DERIVATIVES[op.name](op.args[0], value)]
    elif not op.kwargs and len(op.args) == 2 and op.name in _PARTIALS:
        value, shared = op(), len(operands) == 1
        try:
            partials = _PARTIALS[op.name](*op.args, value)
        except ArithmeticError as error:  # of Python's numbers, which can't be infinite as a tensor's can
            raise NoRule(f"{op.name}: {error}") from error
        derivatives = [d for d, arg in zip(partials, op.args, strict=True) if trace.depends(arg)]
    else:
        operands = list({id(operand): operand for operand in operands}.values())
        value, derivatives = _differentiated(trace, op, operands)
    if value.ndim == 0 or value.shape[0] != trace.batch:
        raise NoRule(f"{op.name} that broadcasts the batch")
    parts = []
    for operand, derivative in zip(operands, derivatives, strict=True):
        terms = _broadcast(trace.terms(operand), operand, value)
        parts.append(terms if derivative is None else scale(terms, _diagonal(derivative, value, shared)))
    return trace.learn(value, parts[0] if len(parts) == 1 else add(*parts))


def _differentiated(trace: Values, op: Operation, operands: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The value, and its derivative in each operand, by reverse mode, whose conventions at kinks are autograd's."""
    shape = operands[0].shape
    with contextlib.suppress(RuntimeError):
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in op.tensors))
    points = {}
    with torch.enable_grad():
        for operand in operands:
            # Broadcast beforehand, so that the derivatives at the entries of the value are not added up.
            point = operand.view_as(operand) if trace.differentiable else operand.detach()
            point = point if operand.shape == shape or operand.ndim != len(shape) else point.expand(shape)
            points[id(operand)] = point if point.requires_grad else point.requires_grad_()
        value = op.at(lambda tensor: points.get(id(tensor), tensor))
        derivatives = torch.autograd.grad(
            value,
            list(points.values()),
            torch.ones_like(value),
            create_graph=trace.differentiable,
            materialize_grads=True,
        )
    if not trace.differentiable:
        value = value.detach()
    if any(derivative.shape != value.shape for derivative in derivatives):
        raise NoRule(f"{op.name} that broadcasts in a way of its own")
    return value, list(derivatives)


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=dtype, device=device)


def _silu_derivative(u: Tensor, y: Tensor) -> Tensor:
    gate = u.sigmoid()
    return torch.addcmul(gate, y, 1 - gate)


def _mish_derivative(u: Tensor, y: Tensor) -> Tensor:
    gate = F.softplus(u).tanh()
    return torch.addcmul(gate, u * u.sigmoid(), 1 - gate.square())


# Derivatives of y = f(u), and partial derivatives of y = f(a, b), of the most common functions: forward mode gives the
# same, but takes longer to set up than a small network's layer to evaluate. None stands for one.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tanh": lambda u, y: torch.addcmul(_one(y.dtype, y.device), y, y, value=-1),
    "sigmoid": lambda u, y: y * (1 - y),
    # torch has two formulas for these, with a graph and without, so that rounding would tell whether a call is verified.
    "silu": _silu_derivative,
    "mish": _mish_derivative,
    "relu": lambda u, y: (u > 0).to(y.dtype),
    "exp": lambda u, y: y,
    "sin": lambda u, y: u.cos(),
    "cos": lambda u, y: -u.sin(),
    "square": lambda u, y: 2 * u,
    "sqrt": lambda u, y: 0.5 / y,
    "rsqrt": lambda u, y: -0.5 * y * y * y,
    "neg": lambda u, y: -1.0,
}
_PARTIALS: dict[str, Callable[[Any, Any, Tensor], tuple[Any, Any]]] = {
    "add": lambda a, b, y: (None, None),
    "sub": lambda a, b, y: (None, -1.0),
    "rsub": lambda a, b, y: (-1.0, None),
    "mul": lambda a, b, y: (b, a),
    "div": lambda a, b, y: (1 / b, -y / b),
}


def _in_place(trace: Values, op: Operation) -> Tensor:
    """The function out of place, at a copy of its argument that stays as it is, and its value over the argument."""
    target, base = op.tensors[0], op.name.rstrip("_")
    if not trace.depends(target):
        raise NoRule(f"{op.name} on a constant")
    before = trace.learn(target.clone(), trace.terms(target))
    plain = op.func if base == op.name else getattr(torch.Tensor, base, None) or getattr(F, base)
    value = _elementwise(trace, op.out_of_place(lambda tensor: before if tensor is target else tensor, plain, base))
    if value.shape != target.shape or value.dtype != target.dtype:
        raise NoRule(f"{op.name} that changes shape or dtype")
    terms = trace.terms(value)
    target.copy_(value)
    return trace.learn(target, terms)


def _broadcast(terms: list[Term], operand: Tensor, value: Tensor) -> list[Term]:
    if operand.shape == value.shape:
        return terms
    if operand.ndim != value.ndim:
        raise NoRule("broadcasting that moves the batch")
    return move(terms, _expansion(operand.shape[1:], value.shape[1:]))


@functools.lru_cache(maxsize=1024)
def _expansion(event: torch.Size, expanded: torch.Size) -> Movement:
    index = torch.arange(event.numel(), device="cpu").view(event).expand(expanded).reshape(-1)
    return Movement(event.numel(), index.numpy())


def _diagonal(derivative: Tensor | float, value: Tensor, may_share: bool) -> Tensor:
    """A derivative as a factor of the value's flattened events, see `Diagonal`; what the batch may share it does."""
    if not isinstance(derivative, Tensor):
        return torch.as_tensor(derivative, dtype=value.dtype, device="cpu")
    if not derivative.is_floating_point():
        derivative = derivative.to(value.dtype)
    if not may_share and derivative.ndim == 2 and derivative.shape == value.shape:
        return derivative
    event = value.shape[1:]
    if may_share and derivative.numel() == 1:
        return derivative.reshape(())
    # An expanded tensor has equal rows, but a gradient for each of them.
    expanded = not derivative.requires_grad and derivative.ndim > 0 and derivative.stride(0) == 0
    if may_share and (derivative.ndim < value.ndim or derivative.shape[0] == 1 or expanded):
        row = derivative[0] if derivative.ndim == value.ndim else derivative
        return row.expand(event).reshape(event.numel())
    if derivative.ndim == value.ndim and derivative.shape == (value.shape[0], *[1] * len(event)):
        return derivative.reshape(value.shape[0], 1)
    return derivative.expand(value.shape).reshape(value.shape[0], event.numel())


def _batch_norm(trace: Values, op: Operation) -> Tensor:
    """With statistics that are constants it is elementwise."""
    training = op.args[5] if len(op.args) > 5 else op.kwargs.get("training", False)
    if training:
        raise NoRule("batch_norm over the batch")
    return _elementwise(trace, op)


# Linear maps with constant coefficients.


def _linear(trace: Values, op: Operation) -> Tensor:
    if op.name in _MATRICES:
        x, matrix = _MATRICES[op.name](*op.args, **op.kwargs)
        if trace.depends(x) and x.ndim == 2 and matrix.ndim == 2:
            if sum(map(trace.depends, op.tensors)) > 1:
                raise NoRule(f"{op.name} of several values of x")
            return _learn_linear(trace, op(), x, matrix)
    return _by_basis(trace, op)


# The state and the matrix (n, m) that is applied to it.
_MATRICES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "linear": lambda input, weight, bias=None: (input, weight),
    "matmul": lambda input, other: (input, other.mT if other.ndim == 2 else other),
    "mm": lambda input, mat2: (input, mat2.mT),
    "addmm": lambda input, mat1, mat2, *, beta=1, alpha=1: (mat1, mat2.mT if alpha == 1 else alpha * mat2.mT),
}


def _by_basis(trace: Values, op: Operation) -> Tensor:
    """The matrix of any linear map: its values at a basis, taken as a batch."""
    tensors = op.tensors
    if sum(map(trace.depends, tensors)) != 1:
        raise NoRule(f"{op.name} of several values of x")
    (x,), value = filter(trace.depends, tensors), op()
    event = x.shape[1:]
    if event.numel() * value.shape[1:].numel() > _LARGEST_MATRIX or value.shape[0] != trace.batch:
        raise NoRule(f"{op.name} of this size")
    size = event.numel()
    # The last points are zero; and there are never as many as samples, so that what is one a sample does not fit.
    count = size + 1 if size + 1 != trace.batch else size + 2
    with torch.autocast(x.device.type, enabled=False):
        points = torch.eye(count, size, dtype=x.dtype, device=x.device).view(count, *event)
        images = op.at(lambda tensor: points if tensor is x else tensor)
    if images.shape != (count, *value.shape[1:]):
        raise NoRule(f"{op.name} that mixes samples")
    matrix = (images[:size] - images[size]).reshape(size, value.shape[1:].numel()).mT
    return _learn_linear(trace, value, x, matrix)


def _learn_linear(trace: Values, value: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        matrix = matrix.to(torch.get_autocast_dtype(x.device.type))
    trace.multiplications += trace.batch * matrix.numel()
    return trace.learn(value, linear(matrix, trace.terms(x)))


def _along_dimensions(trace: Values, op: Operation) -> Tensor:
    """Linear maps along dimensions of the event."""
    x, position = op.args[0] if op.args else op.tensors[0], 2 if op.name == "diff" else 1
    dims = op.kwargs.get("dim", op.args[position] if len(op.args) > position else None)
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    if not dims or any(not isinstance(dim, int) or dim % max(x.ndim, 1) == 0 for dim in dims):
        raise NoRule(f"{op.name} over the batch")
    return _by_basis(trace, op)


def _named(rule: Callable[..., Any], names: str) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names.split(), rule)


_ELEMENTWISE = """
    add sub rsub subtract mul multiply div divide true_divide rdiv neg negative pow rpow float_power square sqrt rsqrt
    reciprocal abs absolute sign sgn exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan arcsin arccos
    arctan sinh cosh tanh asinh acosh atanh arcsinh arccosh arctanh sinc erf erfc erfinv lgamma digamma logit expit
    xlogy log_ndtr ndtr floor ceil round trunc frac fix clamp clamp_min clamp_max clip nan_to_num where maximum
    minimum fmax fmin atan2 arctan2 hypot lerp addcmul addcdiv logaddexp logaddexp2 masked_fill copysign fmod
    remainder heaviside deg2rad rad2deg sigmoid relu relu6 elu selu celu gelu silu mish softplus softsign tanhshrink
    softshrink hardshrink hardtanh hardsigmoid hardswish leaky_relu prelu rrelu logsigmoid log_sigmoid threshold _threshold
    dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d feature_dropout
"""

_MOVEMENT = """
    view reshape flatten unflatten ravel transpose swapaxes swapdims permute movedim moveaxis T mT unsqueeze squeeze
    getitem narrow select index_select take_along_dim gather split split_with_sizes chunk tensor_split unbind hsplit
    vsplit dsplit cat concat concatenate stack hstack vstack dstack column_stack expand expand_as view_as reshape_as
    broadcast_to repeat tile repeat_interleave flip fliplr flipud roll rot90 diagonal unfold atleast_1d atleast_2d
    atleast_3d
"""
_SAME_ENTRIES = "clone contiguous to float double half bfloat16 type type_as positive alias requires_grad_ detach_copy"
_CONSTANT = """
    detach data zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones
    new_full new_empty new_tensor
"""
SAME_EVERYWHERE = {*_ELEMENTWISE.split(), *_MOVEMENT.split(), *_SAME_ENTRIES.split(), *_CONSTANT.split()}
"""Operations that are followed, and do the same at every point."""

RULES: dict[str, Callable[..., Any]] = {
    **_named(_elementwise, _ELEMENTWISE),
    **{f"{name}_": _elementwise for name in _ELEMENTWISE.split()},
    **_named(_movement, _MOVEMENT),
    **_named(_same_entries, _SAME_ENTRIES),
    **_named(_constant, _CONSTANT),
    **_named(_linear, "linear matmul mm addmm einsum tensordot"),
    **_named(_along_dimensions, "cumsum diff"),
    **_named(mean_or_sum, "sum mean"),
    **_named(reduction, "var std logsumexp prod amax amin norm linalg_norm linalg_vector_norm"),
    "batch_norm": _batch_norm,
}

_JOINING = "cat concat concatenate stack hstack vstack dstack column_stack"
CHOOSING = {*_MOVEMENT.split()} - {*_JOINING.split()}
"""Movements whose integer arguments, if there are any, are indices and no entries."""

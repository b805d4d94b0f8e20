"""Rules for operations that make one entry of many: sums, means, variances, norms.

Each entry of the argument is seen by one entry of the result, so the Jacobian is a sum of the entries that belong together,
after a diagonal: the result's derivative in each entry.
"""

import functools
import math

import torch
from torch import Tensor

from divflow.divergence.layered.jacobian import NoRule, linear, scale
from divflow.divergence.layered.operation import Operation
from divflow.divergence.layered.values import Values

__all__ = ["mean_or_sum", "reduction"]

# Elements of the matrix of a sum.
_LARGEST_MATRIX = 2**22


def mean_or_sum(trace: Values, op: Operation) -> Tensor:
    """Linear maps."""
    x, dims = _argument(trace, op)
    value, weights = op(), _sums(x, dims, mean=op.name == "mean")
    trace.multiplications += trace.batch * weights.shape[1]
    return trace.learn(value, linear(weights, trace.terms(x)))


def reduction(trace: Values, op: Operation) -> Tensor:
    """Any function of the entries along some dimensions, differentiated by autograd."""
    x, dims = _argument(trace, op)
    terms, weights = trace.terms(x), _sums(x, dims)
    with torch.enable_grad():
        point = x.view_as(x) if trace.differentiable else x.detach().requires_grad_()
        point = point if point.requires_grad else point.requires_grad_()
        value = op.at(lambda tensor: point if tensor is x else tensor)
        (slope,) = torch.autograd.grad(value, point, torch.ones_like(value), create_graph=trace.differentiable)
    trace.multiplications += trace.batch * weights.shape[1]
    value = value if trace.differentiable else value.detach()
    return trace.learn(value, linear(weights, scale(terms, slope.reshape(trace.batch, weights.shape[1]))))


def _argument(trace: Values, op: Operation) -> tuple[Tensor, tuple[int, ...]]:
    """What is reduced, and along which dimensions of the event, counted from its first."""
    x = op.args[0] if op.args else op.tensors[0]  # whose name is `input` or `x`
    if "out" in op.kwargs or sum(map(trace.depends, op.tensors)) != 1 or not trace.depends(x):
        raise NoRule(f"{op.name} of several values of x")
    position = 2 if "norm" in op.name else 1
    dims = op.kwargs.get("dim", op.kwargs.get("axis", op.args[position] if len(op.args) > position else None))
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    if not dims or any(type(dim) is not int or dim % max(x.ndim, 1) == 0 for dim in dims):
        raise NoRule(f"{op.name} over the batch")
    return x, tuple(dim % x.ndim - 1 for dim in dims)


def _sums(x: Tensor, dims: tuple[int, ...], mean: bool = False) -> Tensor:
    event = x.shape[1:]
    left = math.prod(size for dim, size in enumerate(event) if dim not in dims)
    if left * event.numel() > _LARGEST_MATRIX:
        raise NoRule("a sum of this size")
    return _matrix(event, dims, mean, x.dtype, x.device)


@functools.lru_cache(maxsize=32)
def _matrix(event: torch.Size, dims: tuple[int, ...], mean: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix `(m, n)` of a sum, or mean, of an event's n entries along dimensions."""
    kept = [1 if dim in dims else size for dim, size in enumerate(event)]
    m, n = math.prod(kept), event.numel()
    with torch.inference_mode(False), torch.no_grad():
        place = torch.arange(m, device=device).view(kept).expand(event).reshape(n)
        matrix = torch.zeros(m, n, dtype=dtype, device=device)
        matrix[place, torch.arange(n, device=device)] = m / n if mean and n else 1.0
        return matrix

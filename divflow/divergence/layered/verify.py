"""What a rule says of an operation, compared with autograd at that operation alone.

The Jacobian of a whole field is compared, too, but that may say nothing: where a last layer is zero, whatever lies
before it is multiplied by zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from divflow.divergence.field import flatten_event
from divflow.divergence.layered.jacobian import NoRule, apply
from divflow.divergence.layered.operation import Operation, tensors_in
from divflow.divergence.layered.values import Values
from divflow.verification.seeded import rng_states, set_rng_states

__all__ = ["require_equal", "verify_operation"]

# How many units in the last place may be lost where the terms of a derivative cancel.
_ROUNDINGS = 32


def verify_operation(
    op: Operation,
    operands: list[Tensor],
    follow: Callable[[Tensor, Callable[[], Any]], tuple[Any, Values]],
    otherwise: bool,
) -> None:
    """Compare the Jacobian that is known of an operation with autograd, by products with random vectors.

    The operation is followed as a field of its own, whose state is all of its operands. Operands and constants that are
    zero are replaced, so that they hide nothing.

    Args:
        op: the operation; random numbers are drawn as it will draw them.
        operands: those of its tensors that depend on x.
        follow: calls a function of no arguments, following what it makes of a state, and returns what it returned.
        otherwise: whether it is followed through other operations; their value is then compared, too.

    Raises:
        NoRule: they disagree.
    """
    noise, states = torch.Generator().manual_seed(0), rng_states(operands[0])
    with torch.enable_grad():
        state = torch.cat([flatten_event(_telling(operand, noise)) for operand in operands], dim=1).requires_grad_()
        parts: dict[int, Tensor] = {}

        def evaluate() -> list[Tensor]:
            offset = 0
            for operand in operands:
                size = operand.shape[1:].numel()
                parts[id(operand)] = state.narrow(1, offset, size).reshape(operand.shape).to(operand.dtype).clone()
                offset += size
            telling = torch.Generator().manual_seed(1)
            return tensors_in(op.at(lambda z: parts.get(id(z), _telling(z, telling))))

        results, values = follow(state, evaluate)
        truths = evaluate() if otherwise else results
        set_rng_states(states)
        for result, truth in zip(results, truths, strict=True):
            if result.is_floating_point() and result.shape[:1] == state.shape[:1]:
                if otherwise and (result.shape, result.dtype) != (truth.shape, truth.dtype):
                    raise NoRule(f"{op.name} has another value")
                if otherwise:
                    require_equal(
                        flatten_event(result), flatten_event(truth), result.dtype, f"{op.name} has another value"
                    )
                _verify_result(values, state, result, truth, noise, op.name)


def _verify_result(values: Values, state: Tensor, result: Tensor, truth: Tensor, noise: Generator, name: str) -> None:
    size = result.shape[1:].numel()
    u, v = (
        torch.randn(z.shape, generator=noise, dtype=torch.float64, device="cpu").to(z)
        for z in (flatten_event(result), state)
    )
    true = torch.zeros_like(v)
    if truth.requires_grad:
        gradient = u.view_as(truth)
        (product,) = torch.autograd.grad(truth, state, gradient, retain_graph=True, allow_unused=True)
        true = true if product is None else product * v
    with torch.no_grad(), torch.autocast(state.device.type, enabled=False):
        terms = values.terms(result)
        known = apply(terms, size, v) * u.to(v)
        bound = apply(terms, size, v, magnitudes=True) * u.to(v).abs()
    require_equal(known, true, result.dtype, f"the derivative of {name} is another", bound)


def _telling(tensor: Tensor, noise: Generator) -> Tensor:
    """A tensor whose derivatives show: a copy, which an operation may change, unless it is of zeros only."""
    tensor = tensor.detach().clone()
    if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.numel() or tensor.any():
        return tensor
    return (torch.rand(tensor.shape, generator=noise, dtype=torch.float64, device="cpu") + 0.5).to(tensor)


def require_equal(known: Tensor, true: Tensor, dtype: torch.dtype, reason: str, bound: Tensor | None = None) -> None:
    """That the sums over the entries of every sample agree, in a precision.

    Args:
        known: `(k, n)`.
        true: what it should be.
        dtype: that they were computed in.
        reason: to give where they don't.
        bound: what the entries would be if nothing in them cancelled; its roundoff is allowed, where a softmax is saturated.

    Raises:
        NoRule: they don't.
    """
    scale = torch.linalg.vector_norm(known, dim=1) + torch.linalg.vector_norm(true, dim=1)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.05) * scale
    if bound is not None:
        tolerance = tolerance + _ROUNDINGS * torch.finfo(dtype).eps * bound.sum(dim=1)
    if not ((known.sum(dim=1) - true.sum(dim=1)).abs() <= tolerance).all():
        raise NoRule(reason)

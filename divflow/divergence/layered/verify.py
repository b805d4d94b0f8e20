"""What a rule says of an operation, compared with autograd at that operation alone.

The Jacobian of a whole field is compared, too, but that may say nothing: where a last layer is zero, whatever lies
before it is multiplied by zero.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from divflow.divergence.dense import rng_states, set_rng_states
from divflow.divergence.field import flatten_event
from divflow.divergence.layered.jacobian import NoRule, apply
from divflow.divergence.layered.operation import Operation, tensors_in

if TYPE_CHECKING:
    from divflow.divergence.layered.trace import Trace

__all__ = ["require_equal", "verify_operation"]


def verify_operation(op: Operation, operands: list[Tensor], follow: Callable[[Tensor], "Trace"]) -> None:
    """Compare the Jacobian that is known of an operation with autograd, by products with random vectors.

    The operation is followed as a field of its own, whose state is all of its operands. Operands and constants that are
    zero are replaced, so that they hide nothing.

    Args:
        op: the operation; random numbers are drawn as it will draw them.
        operands: those of its tensors that depend on x.
        follow: makes a trace that starts at a state.

    Raises:
        NoRule: they disagree.
    """
    noise, states = torch.Generator().manual_seed(0), rng_states(operands[0])
    with torch.enable_grad():
        state = torch.cat([flatten_event(_telling(operand, noise)) for operand in operands], dim=1).requires_grad_()
        trace, offset, parts = follow(state), 0, {}
        with trace:
            for operand in operands:
                size = operand.shape[1:].numel()
                parts[id(operand)] = state.narrow(1, offset, size).reshape(operand.shape).to(operand.dtype).clone()
                offset += size
            results = list(tensors_in(op.at(lambda z: parts.get(id(z), _telling(z, noise)))))
        set_rng_states(states)
        for result in results:
            if result.is_floating_point() and result.shape[:1] == state.shape[:1]:
                _verify_result(trace, state, result, noise, op.name)


def _verify_result(trace: "Trace", state: Tensor, result: Tensor, noise: Generator, name: str) -> None:
    size = result.shape[1:].numel()
    u, v = (torch.randn(z.shape, generator=noise, dtype=torch.float64).to(z) for z in (flatten_event(result), state))
    true = torch.zeros_like(v)
    if result.requires_grad:
        gradient = u.view_as(result)
        (product,) = torch.autograd.grad(result, state, gradient, retain_graph=True, allow_unused=True)
        true = true if product is None else product * v
    with torch.no_grad(), torch.autocast(state.device.type, enabled=False):
        known = apply(trace.terms(result), size, v) * u.to(v)
    require_equal(known, true, result.dtype, f"the derivative of {name} is another")


def _telling(tensor: Tensor, noise: Generator) -> Tensor:
    """A tensor whose derivatives show: itself, unless it is of zeros only."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.numel() or tensor.any():
        return tensor
    return (torch.rand(tensor.shape, generator=noise, dtype=torch.float64) + 0.5).to(tensor)


def require_equal(known: Tensor, true: Tensor, dtype: torch.dtype, reason: str) -> None:
    """That the sums over the entries of every sample agree, in a precision.

    Raises:
        NoRule: they don't, for that reason.
    """
    scale = torch.linalg.vector_norm(known, dim=1) + torch.linalg.vector_norm(true, dim=1)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.05)
    if not ((known.sum(dim=1) - true.sum(dim=1)).abs() <= tolerance * scale).all():
        raise NoRule(reason)

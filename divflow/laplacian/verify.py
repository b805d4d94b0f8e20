"""What a tape says, compared with autograd: every operation by itself where it is first seen, and the whole function."""

import torch
from torch import Tensor

from divflow.divergence.layered import NoRule
from divflow.divergence.layered.operation import Operation, described, tensors_in
from divflow.laplacian.jet import Jet
from divflow.laplacian.rules import RULES
from divflow.laplacian.tape import Tape
from divflow.verification.recent import Recent
from divflow.verification.seeded import rng_states, set_rng_states

__all__ = ["require_equal", "verify_operation"]

_DIRECTIONS = 2
# Operations that were right, by what they are called with: shapes, options and numbers.
_RIGHT: Recent[bool] = Recent(4096)


def verify_operation(op: Operation, operands: list[Tensor]) -> None:
    """Compare an operation's rule with autograd: at its operands in double precision, with random jets.

    Operands and constants that are zero are replaced, so that they hide nothing. Random numbers are drawn as the
    operation will draw them.

    Raises:
        NoRule: they disagree.
    """
    roots = {id(operand): operand for operand in operands}
    key = op.name, *described((op.args, op.kwargs), roots, [], True), operands[0].dtype, operands[0].device
    if _RIGHT.get(key):
        return
    noise, states = torch.Generator().manual_seed(0), rng_states(operands[0])
    with torch.enable_grad():
        points = {name: _telling(root, noise).requires_grad_() for name, root in roots.items()}
        tape = Tape([*points.values()], RULES, differentiable=True)
        with tape:
            copies = {name: point.clone() for name, point in points.items()}
            results = tensors_in(op.at(lambda z: copies[id(z)] if id(z) in copies else _telling(z, noise)))
        set_rng_states(states)
        for result in results:
            if result.is_floating_point():
                _verify_result(tape, result, [*points.values()], noise, op.name)
    _RIGHT.keep(key, True)


def _verify_result(tape: Tape, result: Tensor, roots: list[Tensor], noise: torch.Generator, name: str) -> None:
    """First and second derivatives of the product of a result with a random vector."""

    def random(count: int, like: Tensor) -> Tensor:
        return torch.randn(count, *like.shape, generator=noise, dtype=torch.float64, device="cpu").to(like)

    jets = [Jet(random(_DIRECTIONS, root), random(1, root)) for root in roots]
    weights = random(1, result)
    jet = tape.carry(result, jets) or Jet(torch.zeros_like(weights).expand(_DIRECTIONS, *result.shape))
    first, second = result.new_zeros(_DIRECTIONS), result.new_zeros(1)
    if result.requires_grad:
        slopes = _gradients((result * weights[0]).sum(), roots)
        for i in range(_DIRECTIONS):
            along = _total(slopes, [jet.first[i] for jet in jets])
            first[i] = along.detach()
            if along.requires_grad:
                second += _total(_gradients(along, roots), [jet.first[i] for jet in jets]).detach()
        second += _total(slopes, [jet.second[0] for jet in jets if jet.second is not None]).detach()
    known = (jet.first * weights).detach().flatten(1)
    curved = torch.zeros_like(known[:1]) if jet.second is None else (jet.second * weights).detach().flatten(1)
    reason = f"the derivative of {name} is another"
    require_equal(known.sum(dim=1), first, known.abs().sum(dim=1), reason)
    require_equal(curved.sum(dim=1), second, curved.abs().sum(dim=1), reason)


def _gradients(value: Tensor, roots: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, roots, create_graph=True, materialize_grads=True))


def _total(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _telling(tensor: Tensor, noise: torch.Generator) -> Tensor:
    """A tensor in double precision whose derivatives show: itself, unless it is of zeros only."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return tensor
    tensor = tensor.double()
    if tensor.numel() and not tensor.any():
        return (torch.rand(tensor.shape, generator=noise, dtype=torch.float64, device="cpu") + 0.5).to(tensor)
    return tensor.clone()


def require_equal(known: Tensor, true: Tensor, scale: Tensor, reason: str, slack: Tensor | float = 0.0) -> None:
    """That numbers agree, in their precision, relative to the size of what they are sums of.

    Args:
        known: by the rules.
        true: by autograd.
        scale: what they may differ relative to.
        reason: what to say if they differ more.
        slack: a size whose rounding is no difference.

    Raises:
        NoRule: they don't, for that reason.
    """
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(known.dtype, 0.05)
    if not ((known - true).abs() <= tolerance * (scale + true.abs()) + 64 * torch.finfo(known.dtype).eps * slack).all():
        raise NoRule(reason)

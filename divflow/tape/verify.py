"""One rule, compared with autograd at its operation alone, to first order or second.

Derivatives of a whole field are compared, too, but that may say nothing: where a last layer is zero, whatever lies before
it is multiplied by zero.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from divflow.tape.cache import Cache
from divflow.tape.operation import Operation, described, tensors_in
from divflow.tape.randomness import rng_states, set_rng_states
from divflow.tape.registry import registered
from divflow.tape.rule import NoRule, Rule, RuleError
from divflow.tape.tape import Reader, Tape

__all__ = ["TOLERANCES", "Carried", "Carrier", "verifier"]

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative differences that are rounding, in the precision that numbers are computed in; in lower ones 0.05."""

_DIRECTIONS = 2
# Operations that were right, by what they are called with: shapes, options and numbers.
_RIGHT: Cache[bool] = Cache(4096)


class _Differs(Exception):  # noqa: N818 - caught here
    """A rule and autograd disagree."""


class Carried(NamedTuple):
    """Parts whose sums are the products of weights with derivatives of a value.

    Attributes:
        first: of the first derivatives along m directions, `(m, parts)`.
        second: of the sum of the second ones, `(1, parts)`; None if it vanishes.
        magnitude: what they would be if nothing in them cancelled, whose rounding is allowed.
    """

    first: Tensor
    second: Tensor | None
    magnitude: Tensor | float = 0.0


class Carrier(Reader, Protocol):
    """A reader that can be asked for derivatives along directions."""

    def carry(
        self, tape: Tape, output: Tensor, weights: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Carried | None:
        """Those of an output; None where it does not depend on the roots.

        Args:
            tape: that was read.
            output: a tensor of it.
            weights: `(*output)`.
            first: of each root m directions `(m, *root)`.
            second: of each root a second derivative `(1, *root)`; used where the reader is curved.

        Raises:
            NoRule: they are not known.
        """


def verifier(carrier: Callable[[], Carrier]) -> Callable[[Operation, Rule, list[Tensor]], None]:
    """Make what compares rules with autograd, as a tape calls it, by a reader made for each comparison.

    Args:
        carrier: makes the reader.
    """

    def verify(op: Operation, rule: Rule, operands: list[Tensor]) -> None:
        reader = carrier()
        roots = {id(operand): operand for operand in operands}
        own = registered(op.func, op.name) is not None
        key = (
            *op.summary,
            *described((op.args, op.kwargs), roots, [], True),
            *((operand.dtype, operand.device) for operand in operands),
            rule.identity(op),
            type(reader),
            reader.curved,
        )
        if _RIGHT.get(key) and not own:
            return
        try:
            _verify(op, rule, roots, reader)
        except _Differs as error:
            if own:
                raise RuleError(
                    f"the rule that was registered for {op.name} is wrong: {error}. Correct it, or unregister it."
                ) from None
            raise NoRule(str(error).partition(":")[0]) from error
        _RIGHT.keep(key, True)

    return verify


def _verify(op: Operation, rule: Rule, roots: dict[int, Tensor], reader: Carrier) -> None:
    """Compare in double precision, with random numbers drawn as the operation will draw them."""
    first_root = next(iter(roots.values()))
    states = rng_states(first_root)
    noise = Generator("cpu").manual_seed(0)
    try:
        with torch.enable_grad():
            points = {name: _nonzero(root, noise).requires_grad_() for name, root in roots.items()}
            constants = {id(z): _nonzero(z, noise) for z in op.tensors if id(z) not in roots}
            tape = Tape([*points.values()], reader, differentiable=True)

            def evaluate() -> list[Tensor]:
                copies = {name: point.clone() for name, point in points.items()}
                copies |= {name: constant.clone() for name, constant in constants.items()}
                return tensors_in(op.at(lambda z: copies[id(z)]))

            results = truths = tape.follow(evaluate)
            if rule.compares_values:
                set_rng_states(states)
                truths = evaluate()
                _require_values(op, results, truths)
            for result, truth in zip(results, truths, strict=True):
                if result.is_floating_point():
                    _require_derivatives(op, tape, reader, result, truth, [*points.values()], noise)
    finally:
        set_rng_states(states)


def _require_values(op: Operation, results: list[Tensor], truths: list[Tensor]) -> None:
    for result, truth in zip(results, truths, strict=True):
        if (result.shape, result.dtype) != (truth.shape, truth.dtype):
            raise _Differs(f"{op.name} has another value: of shape {tuple(result.shape)} and {result.dtype}")
        scale = truth.detach().abs().nan_to_num(0, 0, 0).amax() if truth.numel() else truth.detach().sum()
        _require(result.detach(), truth.detach(), scale, f"{op.name} has another value")


def _require_derivatives(
    op: Operation, tape: Tape, reader: Carrier, result: Tensor, truth: Tensor, roots: list[Tensor], noise: Generator
) -> None:
    """First and second derivatives of the product of a result with a random vector."""

    def random(count: int, like: Tensor) -> Tensor:
        return torch.randn(count, *like.shape, generator=noise, dtype=torch.float64, device="cpu").to(like)

    directions = [random(_DIRECTIONS, root) for root in roots]
    bent = [random(1, root) for root in roots]
    weights = random(1, result)[0]
    carried = reader.carry(tape, result, weights, directions, bent)
    first, second = result.new_zeros(_DIRECTIONS), result.new_zeros(1)
    if truth.requires_grad:
        slopes = _gradients((truth * weights).sum(), roots, create_graph=reader.curved)
        for i in range(_DIRECTIONS):
            along = _total(slopes, [direction[i] for direction in directions])
            first[i] = along.detach()
            if reader.curved and along.requires_grad:
                second += _total(_gradients(along, roots, True), [direction[i] for direction in directions]).detach()
        second += _total(slopes, [row[0] for row in bent]).detach()
    known = weights.new_zeros(_DIRECTIONS, 1) if carried is None else carried.first.detach()
    slack = 0.0 if carried is None else 64 * torch.finfo(result.dtype).eps * carried.magnitude
    reason = f"the derivative of {op.name} differs"
    _require(known.sum(dim=1), first, known.abs().sum(dim=1), reason, slack)
    if reader.curved:
        bends = None if carried is None else carried.second
        curved = known[:1] * 0 if bends is None else bends.detach()
        _require(curved.sum(dim=1), second, curved.abs().sum(dim=1), reason, slack)


def _gradients(value: Tensor, roots: list[Tensor], create_graph: bool) -> list[Tensor]:
    return list(torch.autograd.grad(value, roots, create_graph=create_graph, retain_graph=True, materialize_grads=True))


def _total(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _require(known: Tensor, true: Tensor, scale: Tensor, reason: str, slack: Tensor | float = 0.0) -> None:
    """Require that numbers agree, relative to the size of the terms of their sums; values that are not finite prove nothing."""
    error = (known - true).abs()
    allowed = TOLERANCES.get(known.dtype, 0.05) * (scale + true.abs()) + slack
    wrong = ~((error <= allowed) | (known == true) | (known.isnan() & true.isnan()))
    if wrong.any():
        at = wrong.flatten().nonzero()[0, 0]
        raise _Differs(
            f"{reason}: the rule gives {known.flatten()[at].item():.6g} where autograd finds {true.flatten()[at].item():.6g}, "
            "in sums of random weights"
        )


def _nonzero(tensor: Tensor, noise: Generator) -> Tensor:
    """A tensor in double precision whose derivatives show: a copy, which an operation may change, unless it is of zeros only."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return tensor.clone()
    tensor = tensor.double()
    if tensor.numel() and not tensor.any():
        return (torch.rand(tensor.shape, generator=noise, dtype=torch.float64, device="cpu") + 0.5).to(tensor)
    return tensor.clone()

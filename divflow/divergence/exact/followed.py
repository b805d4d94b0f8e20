"""A field evaluated once, with a record of what it did to its state."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from divflow.divergence.exact.layered.reader import JacobianReader
from divflow.operators.field import AtTime, Field, checked_value
from divflow.operators.linearization import Linearization, linearize
from divflow.tape import NoRule, Tape
from divflow.tape.verify import verifier
from divflow.verification.watch import Watch

__all__ = ["Followed", "follow"]


class Followed(NamedTuple):
    """A field evaluated once at a point.

    Attributes:
        field: the value, ready for products.
        output: the tensor that the field returned.
        tape: of the evaluation.
        reader: of the tape, for Jacobians.
    """

    field: Linearization
    output: Tensor
    tape: Tape
    reader: JacobianReader

    @property
    def signature(self) -> Hashable:
        """A value that is equal for evaluations of the same structure."""
        return tuple(self.tape.signature)

    @property
    def structure(self) -> Hashable:
        """The signature without the batch size."""
        return tuple((name, *map(_without_batch, rest)) for name, *rest in self.tape.signature if name not in _RESHAPES)

    def hides(self) -> bool:
        """Whether a part of the field is hidden from torch functions, or does not lead from x to the output."""
        try:
            return self.tape.output(self.output) is None or bool(self.tape.hidden)
        except NoRule:
            return bool(self.tape.hidden)


# Operations whose arguments are shapes.
_RESHAPES = {"view", "reshape", "expand", "repeat", "tile", "broadcast_to", "unflatten"}


def _without_batch(summary: Hashable) -> Hashable:
    if isinstance(summary, torch.Size):
        return summary[1:]
    return tuple(map(_without_batch, summary)) if isinstance(summary, tuple) else summary


def follow(
    g: Field,
    t: Tensor,
    x: Tensor,
    products: bool,
    verify: bool = False,
    watcher: Watch | None = None,
    read: bool = True,
) -> Followed:
    """Evaluate a field at (t, x) and follow what it does to x.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        products: whether the value's graph from x is needed, for a verification and for products with the Jacobian.
        verify: whether to compare the rule of each operation with autograd.
        watcher: of this evaluation, which then needs `products`.
        read: whether to read Jacobians, or only what was done.
    """
    differentiable = products or torch.is_grad_enabled()
    at = AtTime(g, t) if watcher is None else watcher
    seen: list[tuple[Tensor, Tape, JacobianReader]] = []

    def followed(z: Tensor) -> Tensor:
        batch = len(x)
        reader = JacobianReader(batch, differentiable, verify, read)
        rules = verifier(lambda: JacobianReader(batch, differentiable=True)) if verify else None
        tape = Tape([z], reader, differentiable, rules)
        with tape.recording:
            output = at(z)
        tape.require_whole()
        seen.append((output, tape, reader))
        return output

    return Followed(linearize(followed, x, checked_value, products, watched=watcher or False), *seen[0])

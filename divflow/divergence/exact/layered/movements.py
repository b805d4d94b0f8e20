"""Where the entries of a moved value come from."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from divflow.divergence.exact.layered.jacobian import Movement, Term, move
from divflow.tape import NoRule
from divflow.tape.cache import Cache
from divflow.tape.operation import Operation, tensors_in

__all__ = ["broadcast", "expansion", "movements_of"]

_KEPT: Cache[list[list[Movement]]] = Cache(1024)


def movements_of(op: Operation, places: Sequence[int], batch: int) -> list[list[Movement]]:
    """Of each of an operation's results, where its entries come from in the operands at some places.

    Raises:
        NoRule: it moves between samples, or is no movement.
    """
    found = _KEPT.get(op.summary)
    if found is None:
        found = _found(op, places, batch)
        _KEPT.keep(op.summary, found)
    return found


def _found(op: Operation, places: Sequence[int], batch: int) -> list[list[Movement]]:
    """Where each entry of an operation's results comes from, in each operand: torch itself moves numbered entries.

    They are moved twice, under other numbers, so that a result which is none of them is known for a constant.
    """
    sizes = [op.tensors[i].shape[1:].numel() for i in places]
    total = max(1, sum(sizes))
    shift = batch * total

    def moved(start: int) -> list[Tensor]:
        offset, numbered = start, {}
        for i, tensor in enumerate(op.tensors):
            if i in places:
                event = tensor.shape[1:]
                entries = torch.arange(offset, offset + event.numel(), device="cpu").view(1, *event)
                numbered[i] = entries + total * torch.arange(batch, device="cpu").view(batch, *[1] * len(event))
                offset += event.numel()
            else:
                constant = tensor.is_floating_point() or tensor.is_complex()
                numbered[i] = torch.full(tensor.shape, -1, device="cpu") if constant else tensor.cpu()
        return tensors_in(op.at_places(numbered))

    found = []
    for tensor, again in zip(moved(0), moved(shift), strict=True):
        if tensor.ndim == 0 or tensor.shape[0] != batch:
            raise NoRule(f"{op.name} over the batch")
        rows, others = (entries.reshape(batch, entries.shape[1:].numel()).long() for entries in (tensor, again))
        entries = others - rows == shift
        if not (entries | (others == rows)).all():
            raise NoRule(f"{op.name} that chooses by what it moves")
        index = torch.where(entries, rows % total, -1)
        between = (rows // total != torch.arange(batch, device="cpu")[:, None]) & entries
        if between.any() or (index != index[:1]).any():
            raise NoRule(f"{op.name} between samples")
        chosen, offset, parts = index[0].numpy(), 0, []
        for size in sizes:
            inside = (chosen >= offset) & (chosen < offset + size)
            parts.append(Movement(size, np.where(inside, chosen - offset, -1)))
            offset += size
        found.append(parts)
    return found


def broadcast(terms: list[Term], shape: torch.Size, value: torch.Size) -> list[Term]:
    """The terms of a value of some shape as they are in one of another."""
    if shape == value:
        return terms
    if len(shape) != len(value):
        raise NoRule("broadcasting that moves the batch")
    return move(terms, expansion(shape[1:], value[1:]))


@functools.lru_cache(maxsize=1024)
def expansion(event: torch.Size, expanded: torch.Size) -> Movement:
    """The movement of an event that is expanded."""
    index = torch.arange(event.numel(), device="cpu").view(event).expand(expanded).reshape(-1)
    return Movement(event.numel(), index.numpy())

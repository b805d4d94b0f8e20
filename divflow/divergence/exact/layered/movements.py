"""Where each entry of a moved value, such as a reshaped or indexed one, comes from."""

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
    """Find the movements of an operation: for each result, one movement from each operand at `places`.

    Raises:
        NoRule: entries move between samples, or the operation does more than move them.
    """
    found = _KEPT.get(op.summary)
    if found is None:
        found = _found(op, places, batch)
        _KEPT.keep(op.summary, found)
    return found


def _found(op: Operation, places: Sequence[int], batch: int) -> list[list[Movement]]:
    """Call the operation on operands whose entries are their own numbers, and read the numbers in the results.

    It is called twice, with numbers that differ by `shift`. Entries that do not shift are constants.
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
    """The terms of a value of one shape that is broadcast to another."""
    if shape == value:
        return terms
    if len(shape) != len(value):
        raise NoRule("broadcasting that moves the batch")
    return move(terms, expansion(shape[1:], value[1:]))


@functools.lru_cache(maxsize=1024)
def expansion(event: torch.Size, expanded: torch.Size) -> Movement:
    """The movement of `tensor.expand` for one event."""
    index = torch.arange(event.numel(), device="cpu").view(event).expand(expanded).reshape(-1)
    return Movement(event.numel(), index.numpy())

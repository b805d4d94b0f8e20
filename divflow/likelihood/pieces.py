"""Rules on intervals of [0, 1]: with more nodes, or in halves, where they are too coarse."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.likelihood.patterson import patterson

__all__ = ["Piece", "Rule", "rule_on"]


class Piece(NamedTuple):
    """An interval of [0, 1], and the number of its nodes."""

    low: float
    high: float
    nodes: int

    def finer(self, counts: tuple[int, ...]) -> "list[Piece]":
        """Return it with the next number of nodes, or its halves if there is no larger number."""
        following = counts[counts.index(self.nodes) + 1 :]
        if following:
            return [Piece(self.low, self.high, following[0])]
        middle = (self.low + self.high) / 2
        return [Piece(self.low, middle, counts[0]), Piece(middle, self.high, counts[0])]

    def resolving(self, steps: Callable[[float, float], float], counts: tuple[int, ...], most: int) -> "list[Piece]":
        """Return finer pieces with at least as many nodes as the solver took steps in each; `most` pieces, or one more."""
        pieces, done = [self], 0
        while done < len(pieces) <= most:
            piece = pieces[done]
            if steps(piece.low, piece.high) <= piece.nodes:
                done += 1
            else:
                pieces[done : done + 1] = piece.finer(counts)
        return pieces


class Rule(NamedTuple):
    """Nodes in (0, 1), increasing, with the weights of a rule and those of a smaller one."""

    nodes: Float[Tensor, " nodes"]
    weights: Float[Tensor, " nodes"]
    lesser: Float[Tensor, " nodes"]


# Copied to a device once, because the host waits for the copy.
@functools.lru_cache(maxsize=256)
def rule_on(nested: bool, pieces: tuple[Piece, ...], dtype: torch.dtype, device: torch.device) -> Rule:
    """Build Patterson's rules, or those of Gauss and Kronrod, on some intervals.

    Args:
        nested: whether they are Patterson's.
        pieces: the intervals.
        dtype: of nodes and weights.
        device: likewise.
    """
    columns = []
    for low, high, count in pieces:
        nodes, weights, lesser = patterson(count) if nested else gauss_kronrod(count)
        columns.append((low + (high - low) * nodes, (high - low) * weights, (high - low) * lesser))
    with torch.inference_mode(False):
        joined = (np.concatenate(column) for column in zip(*columns, strict=True))
        return Rule(*(torch.as_tensor(column, dtype=dtype, device=device) for column in joined))

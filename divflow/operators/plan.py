"""How an exact divergence is computed: the choice."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "conditions"]


class Plan(NamedTuple):
    """How an exact divergence is computed.

    Attributes:
        method: "own", "layered", "colored", "reverse" or "forward".
        why: the reason.
        products: products with the Jacobian, over the whole batch; none where its trace has a closed form.
        chunk_size: how many of them are taken in one pass.
        cost_in_forward_passes: estimated cost of value and divergence, relative to the value alone.
        cost_in_probes: the same, relative to value and one vector-Jacobian product.
        memory: estimated bytes beyond those of the value, without a graph.
    """

    method: str
    why: str
    products: int
    chunk_size: int
    cost_in_forward_passes: float
    cost_in_probes: float
    memory: int


def conditions(t: Tensor, x: Tensor) -> tuple[Hashable, ...]:
    """What a plan depends on beside the field."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return t.ndim, tuple(x.shape), x.dtype, x.device, torch.is_grad_enabled(), autocast

"""The plan of an exact divergence or Laplacian: how it is computed, and why."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "conditions"]


class Plan(NamedTuple):
    """How an exact divergence is computed, why, and what it costs.

    Attributes:
        method: "own", "layered", "colored", "reverse" or "forward"; of a Laplacian "forward_laplacian" or "reverse".
        why: the reason.
        products: products with the Jacobian, over the whole batch; none if its trace has a closed form.
        chunk_size: how many of them one pass takes.
        cost_in_forward_passes: estimated cost of value and divergence, relative to the value alone.
        cost_in_probes: the same, relative to value and one vector-Jacobian product (one probe).
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
    """Return what a plan depends on, apart from the field.

    Args:
        t: time.
        x: states.
    """
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return t.ndim, tuple(x.shape), x.dtype, x.device, torch.is_grad_enabled(), autocast

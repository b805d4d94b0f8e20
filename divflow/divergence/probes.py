"""Random probes v with E[v v^T] = I, so that E[v^T J v] = tr J."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from divflow.divergence.field import event_size

__all__ = ["DISTRIBUTIONS", "draw_probes"]


def _rademacher(shape: tuple[int, ...], generator: Generator | None, device: torch.device) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=device) * 2 - 1


def _gaussian(shape: tuple[int, ...], generator: Generator | None, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)


def _sphere(shape: tuple[int, ...], generator: Generator | None, device: torch.device) -> Tensor:
    direction = _gaussian(shape, generator, device)
    return direction * (math.sqrt(shape[-1]) / torch.linalg.vector_norm(direction, dim=-1, keepdim=True))


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], Generator | None, torch.device], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "sphere": _sphere,
}


def draw_probes(distribution: str, count: int, x: Tensor, generator: Generator | None = None) -> Tensor:
    """Independent probes for every sample, `(count, k, *event)`, of x's dtype and device.

    They are drawn on the generator's device, so that a generator on the CPU gives the same probes
    whatever device x is on.
    """
    device = x.device if generator is None else generator.device
    probes = DISTRIBUTIONS[distribution]((count, x.shape[0], event_size(x)), generator, device)
    return probes.to(device=x.device, dtype=x.dtype).view(count, *x.shape)

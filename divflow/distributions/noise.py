"""Random tensors like a given one, drawn on the generator's device, so that a seed gives the same on every device."""

import torch
from torch import Generator, Tensor

from divflow.errors import check_generator

__all__ = ["integers_like", "normal_like", "permutation_like", "uniform_like", "uniform_times_like"]


def normal_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Standard normal draws of x's shape, dtype and device."""
    device = _device(x, generator)
    return torch.randn(x.shape, generator=generator, dtype=_drawn(x), device=device).to(x)


def uniform_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Uniform draws in [0, 1) of x's shape, dtype and device."""
    device = _device(x, generator)
    return torch.rand(x.shape, generator=generator, dtype=_drawn(x), device=device).to(x)


def integers_like(x: Tensor, high: int, generator: Generator | None = None) -> Tensor:
    """One of 0, ..., high - 1 for each row of x, `(k,)`, on x's device."""
    device = _device(x, generator)
    return torch.randint(high, x.shape[:1], generator=generator, device=device).to(x.device)


def permutation_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """The numbers of x's rows in random order, `(k,)`, on x's device."""
    device = _device(x, generator)
    return torch.randperm(len(x), generator=generator, device=device).to(x.device)


def uniform_times_like(x: Tensor, generator: Generator | None = None, *, stratified: bool) -> Tensor:
    """Uniform draws in [0, 1), one for each row of x, `(k,)`, in float64 on x's device.

    Stratified, they come from k equal parts, one each, in random order: each is uniform, but their mean varies far
    less (as Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    u = uniform_like(torch.empty(len(x), device=x.device, dtype=torch.float64), generator)
    return (permutation_like(x, generator) + u) / max(1, len(x)) if stratified else u


def _device(x: Tensor, generator: Generator | None) -> torch.device:
    check_generator(generator)
    return x.device if generator is None else generator.device


def _drawn(x: Tensor) -> torch.dtype:
    """Half precisions are rounded from float32: some devices can't draw them, and 1 would be among their uniforms."""
    return torch.promote_types(x.dtype, torch.float32)

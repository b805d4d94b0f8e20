"""Random tensors like a given one, drawn on the generator's device, so that a seed gives the same on every device."""

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from divflow.errors import check_generator
from divflow.verification.seeded import seeded

__all__ = ["drawn_like", "integers_like", "normal_like", "permutation_like", "uniform_like", "uniform_times_like"]


def normal_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Draw standard normal numbers of x's shape, dtype and device.

    Args:
        x: the tensor.
        generator: torch's default one if None.
    """
    device = _device(x, generator)
    return torch.randn(x.shape, generator=generator, dtype=_drawn(x), device=device).to(x)


def uniform_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Draw uniform numbers in [0, 1) of x's shape, dtype and device.

    Args:
        x: the tensor.
        generator: torch's default one if None.
    """
    device = _device(x, generator)
    return torch.rand(x.shape, generator=generator, dtype=_drawn(x), device=device).to(x)


def drawn_like(x: Tensor, distribution: Distribution, generator: Generator | None = None) -> Tensor:
    """Draw as many samples of a distribution as x has rows, in x's dtype and on its device.

    Args:
        x: the tensor.
        distribution: of x's event shape.
        generator: torch's default one if None.
    """
    check_generator(generator)
    if generator is None:
        return distribution.sample(x.shape[:1]).to(x)
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)  # distributions draw from the default
    with seeded(int(seed.item())):
        return distribution.sample(x.shape[:1]).to(x)


def integers_like(x: Tensor, high: int, generator: Generator | None = None) -> Tensor:
    """Draw one of 0, ..., high - 1 for each row of x, `(k,)`, on x's device.

    Args:
        x: the tensor.
        high: how many integers there are.
        generator: torch's default one if None.
    """
    device = _device(x, generator)
    return torch.randint(high, x.shape[:1], generator=generator, device=device).to(x.device)


def permutation_like(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Draw the numbers of x's rows in random order, `(k,)`, on x's device.

    Args:
        x: the tensor.
        generator: torch's default one if None.
    """
    device = _device(x, generator)
    return torch.randperm(len(x), generator=generator, device=device).to(x.device)


def uniform_times_like(x: Tensor, generator: Generator | None = None, *, stratified: bool) -> Tensor:
    """Draw a uniform number in [0, 1) for each row of x, `(k,)`, in float64 on x's device.

    Stratified numbers come from k equal parts, one each, in random order: each is uniform, but their mean varies far less
    (as Kingma et al. 2021, arXiv:2107.00630, appendix I.1).

    Args:
        x: the tensor.
        generator: torch's default one if None.
        stratified: whether they come from equal parts.
    """
    u = uniform_like(torch.empty(len(x), device=x.device, dtype=torch.float64), generator)
    return (permutation_like(x, generator) + u) / max(1, len(x)) if stratified else u


def _device(x: Tensor, generator: Generator | None) -> torch.device:
    check_generator(generator)
    return x.device if generator is None else generator.device


def _drawn(x: Tensor) -> torch.dtype:
    """The dtype to draw in: float32 for half precisions, which some devices can't draw and in which 1 could be drawn."""
    return torch.promote_types(x.dtype, torch.float32)

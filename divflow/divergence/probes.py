"""Random probes v with E[v v^T] = I, so that E[v^T J v] = tr J."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from divflow.errors import check_generator
from divflow.operators.field import event_size

__all__ = ["DISTRIBUTIONS", "draw_orthogonal_probes", "draw_probes"]


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
    """Draw independent probes for every sample, `(count, k, *event)`, of x's dtype and device.

    They are drawn on the generator's device, so that a generator on the CPU gives the same probes whatever device x is on.

    Args:
        distribution: "rademacher", "gaussian" or "sphere".
        count: probes per sample.
        x: states `(k, *event)`.
        generator: torch's default one if None.
    """
    check_generator(generator)
    device = x.device if generator is None else generator.device
    probes = DISTRIBUTIONS[distribution]((count, x.shape[0], event_size(x)), generator, device)
    return probes.to(device=x.device, dtype=x.dtype).view(count, *x.shape)


def draw_orthogonal_probes(
    distribution: str, count: int, nodes: int, x: Tensor, generator: Generator | None = None
) -> Tensor:
    """Draw probes `(count, nodes, k, *event)` that are mutually orthogonal for each sample along `nodes`.

    Each probe has the given distribution, so any mean of v^T J v is unbiased. "rademacher" is possible only if D is a
    power of two; else the sphere's distribution is taken. Only D probes can be orthogonal: more nodes are taken in groups
    of D consecutive ones. The `count` sets are independent.

    Args:
        distribution: "rademacher", "gaussian" or "sphere".
        count: independent sets.
        nodes: probes per set.
        x: states `(k, *event)`.
        generator: torch's default one if None.
    """
    check_generator(generator)
    size, device = event_size(x), x.device if generator is None else generator.device
    shape = count, x.shape[0]
    if size == 0:
        return x.new_zeros(count, nodes, *x.shape)
    draw = _signed_hadamard if distribution == "rademacher" and size & (size - 1) == 0 else _random_orthogonal
    groups = []
    for start in range(0, nodes, size):
        group = draw(shape, min(size, nodes - start), size, generator, device)
        if distribution == "gaussian":
            norms = torch.linalg.vector_norm(_gaussian(group.shape, generator, device), dim=-1, keepdim=True)
            group = group * norms / math.sqrt(size)
        groups.append(group.to(device=x.device, dtype=x.dtype))
    return torch.cat(groups, dim=2).transpose(1, 2).reshape(count, nodes, *x.shape)


def _signed_hadamard(
    shape: tuple[int, ...], rows: int, size: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """Some rows of a Hadamard matrix, their columns' signs flipped at random: `(*shape, rows, size)`."""
    chosen = torch.randperm(size, generator=generator, device=device)[:rows]
    common = chosen[:, None] & torch.arange(size, device=device)
    # Sylvester's matrix: entry (i, j) is -1 to the number of bits that i and j have in common.
    bits = sum((common >> bit) & 1 for bit in range(max(1, size.bit_length())))
    return (1 - 2 * (bits % 2)) * _rademacher((*shape, 1, size), generator, device)


def _random_orthogonal(
    shape: tuple[int, ...], rows: int, size: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """Rows of a random orthogonal matrix (Haar's measure) times sqrt(size): `(*shape, rows, size)`."""
    q, r = torch.linalg.qr(_gaussian((*shape, size, rows), generator, device))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT * math.sqrt(size)

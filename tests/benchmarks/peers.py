"""The ways in which other libraries take the exact divergence, on vectors `(k, D)`, written out."""

from collections.abc import Callable

import torch
from torch import Tensor


def vmap_of_jacrev(g: Callable, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """torch.func's own recipe: a whole Jacobian for each sample."""

    def one(z: Tensor) -> tuple[Tensor, Tensor]:
        value = g(t, z[None])[0]
        return value, value

    jacobian, value = torch.func.vmap(torch.func.jacrev(one, has_aux=True))(x)
    return value, jacobian.diagonal(dim1=1, dim2=2).sum(dim=1)


def batched_rows(g: Callable, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """zuko's: the identity as one batch of vectors, D rows of the Jacobian in one pass."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = g(t, x)
        identity = torch.eye(x.shape[1], dtype=x.dtype).expand(*x.shape, x.shape[1]).movedim(-1, 0)
        (jacobian,) = torch.autograd.grad(value, x, identity, create_graph=True, is_grads_batched=True)
    return value.detach(), torch.einsum("i...i", jacobian).detach()


def loop(g: Callable, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """FFJORD's, torchcfm's and flow_matching's: one backward pass for each dimension."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = g(t, x)
        flat = value.flatten(1)
        trace = torch.zeros(len(x), dtype=x.dtype)
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
            trace = trace + row.flatten(1)[:, i]
    return value.detach(), trace

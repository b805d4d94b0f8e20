"""Brute force: the Jacobian of a field in float64, entry by entry, and what follows from it."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Reference", "brute_force", "quadratic_forms"]


class Reference(NamedTuple):
    """A field in float64.

    Attributes:
        value: `(k, *event)`.
        jacobian: `(k, D, D)`, of each sample.
        divergence: `(k,)`.
    """

    value: Tensor
    jacobian: Tensor
    divergence: Tensor


def brute_force(field, t: Tensor, x: Tensor) -> Reference:
    """One backward pass for each output, with its graph."""
    x = x if x.requires_grad else x.detach().clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        value = field(t, x.clone())
        flat = value.reshape(len(x), x.shape[1:].numel())
        rows = [
            torch.autograd.grad(flat[:, i].sum(), x, create_graph=True, materialize_grads=True)[0].reshape(flat.shape)
            if flat.requires_grad
            else torch.zeros_like(flat)
            for i in range(flat.shape[1])
        ]
        jacobian = torch.stack(rows, 1) if rows else flat.new_zeros(len(x), 0, 0)
        return Reference(value, jacobian, jacobian.diagonal(dim1=1, dim2=2).sum(1))


def quadratic_forms(jacobian: Tensor, probes: Tensor) -> Tensor:
    """The mean of v^T J v over probes `(m, k, *event)`."""
    v = probes.flatten(2).double() if probes.ndim > 2 else probes[..., None].double()
    return torch.einsum("mki,kij,mkj->mk", v, jacobian, v).mean(0)

"""The exact divergence by one `autograd.grad` per dimension: the slowest way, the most tolerant, and the reference."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.divergence.estimator import Estimate, Estimator
from divflow.operators.field import Field, accumulation_dtype, event_size, flatten_event
from divflow.operators.linearization import linearize_field
from divflow.operators.progress import report

__all__ = ["Autograd"]


@dataclass(frozen=True)
class Autograd(Estimator):
    """The exact divergence by D reverse passes, for any field that autograd can differentiate.

        (div g)_b = sum_i [e_i^T J_b]_i

    Each pass takes one dimension and reads one diagonal entry. It needs neither batching nor forward-mode rules, so it
    also serves custom `autograd.Function`s and in-place code. Cost: one evaluation of the field and D products.

    Example:
        >>> from divflow.divergence import divergence
        >>> divergence(lambda t, x: t * x**2, 0.5, torch.tensor([[1.0, 2.0]]), Autograd())
        tensor([3.])
    """

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Return the value, the exact divergence and a standard error of zero; `generator` is not used."""
        field = linearize_field(g, t, x)
        divergence = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
        for i in range(event_size(x)):
            basis = x.new_zeros(x.shape[0], event_size(x))
            basis[:, i] = 1
            row = field.pullback(basis.view(1, *x.shape))
            divergence = divergence + flatten_event(row, 2)[0, :, i]
            report("products", i + 1, event_size(x))
        return Estimate(field.value, divergence, torch.zeros_like(divergence, requires_grad=False))

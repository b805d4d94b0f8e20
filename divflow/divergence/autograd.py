"""The exact divergence by one `autograd.grad` a dimension: slowest, most tolerant, the reference."""

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
    """Exact: D reverse passes, one dimension at a time, each read at its diagonal entry.

        (div g)_b = sum_i [e_i^T J_b]_i

    It needs neither batching nor forward-mode rules, so it works for every field that autograd can
    differentiate (custom `autograd.Function`s, in-place code). Cost: one evaluation and D products.
    """

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the exact divergence and a standard error of zero; `generator` is not used."""
        field = linearize_field(g, t, x)
        divergence = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
        for i in range(event_size(x)):
            basis = x.new_zeros(x.shape[0], event_size(x))
            basis[:, i] = 1
            row = field.pullback(basis.view(1, *x.shape))
            divergence = divergence + flatten_event(row, 2)[0, :, i]
            report("products", i + 1, event_size(x))
        return Estimate(field.value, divergence, torch.zeros_like(divergence, requires_grad=False))

"""The mean Jacobian of some samples, dense: of a batch, of given states, and along time."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.divergence.dense import products_per_pass
from divflow.divergence.estimator import accumulation_dtype
from divflow.divergence.field import Field, Linearization, event_size, flatten_event, linearize_field

__all__ = ["MeanJacobianCurve", "of_batch", "of_states"]

Matrices = Float[Tensor, "times size size"]


def of_batch(field: Linearization, x: Tensor, times: int, references: int) -> Matrices:
    """The mean Jacobian of a batch at each of several times, from a few products with all of it; a constant.

    Sample b gives m consecutive rows of its Jacobian, sample b + 1 the next m, and so on around the D rows, so that
    every row is the mean over `references` samples at least: `m = references * D / k` products, rounded up.

    Args:
        field: evaluated at x, of more than `references` samples a time.
        x: states `(times * k, *event)`, those of one time after another.
        times: how many.
        references: samples that every row is the mean of.
    """
    size, batch = event_size(x), len(x) // times
    count = math.ceil(references * size / batch)
    order = torch.arange(batch * count, device=x.device)
    rows = torch.eye(size, dtype=x.dtype, device=x.device)[order.view(batch, count).T % size]
    vectors = rows[:, None].expand(count, times, batch, size).reshape(count, *x.shape)
    products = torch.cat([field.pullback(chunk, constant=True) for chunk in vectors.split(products_per_pass(x))])
    # In the order of samples, and of the rows of each: row i of the matrix is every D-th from the i-th on.
    sequence = products.view(count, times, batch, size).permute(1, 2, 0, 3).flatten(1, 2).to(accumulation_dtype(x))
    rounds = math.ceil(batch * count / size)
    padded = torch.nn.functional.pad(sequence, (0, 0, 0, rounds * size - batch * count))
    samples = rounds - (torch.arange(size, device=x.device) >= batch * count - (rounds - 1) * size).to(sequence.dtype)
    return padded.view(times, rounds, size, size).sum(dim=1) / samples[:, None]


@torch.no_grad()
def of_states(g: Field, t: Tensor, states: Tensor) -> Float[Tensor, "size size"]:
    """The mean Jacobian of g at t `()` and states `(r, *event)`, a constant."""
    field, size = linearize_field(g, t, states), event_size(states)
    basis = torch.eye(size, dtype=states.dtype, device=states.device).view(size, 1, *states.shape[1:])
    rows = [
        flatten_event(field.pullback(chunk.expand(-1, *states.shape)), 2).mean(dim=1, dtype=accumulation_dtype(states))
        for chunk in basis.split(products_per_pass(states))
    ]
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class MeanJacobianCurve:
    """Matrices that are known at some times, linear between these and constant beyond.

    Attributes:
        times: increasing, `(n,)`, n >= 2.
        matrices: `(n, D, D)`.
    """

    times: Float[Tensor, " n"]
    matrices: Float[Tensor, "n size size"]

    def at(self, times: Float[Tensor, " times"]) -> Matrices:
        """The matrices at other times."""
        times = times.detach().to(self.times).contiguous()
        after = torch.searchsorted(self.times, times).clamp(1, len(self.times) - 1)
        low, high = self.times[after - 1], self.times[after]
        share = ((times - low) / (high - low)).clamp(0, 1).to(self.matrices.dtype)
        return torch.lerp(self.matrices[after - 1], self.matrices[after], share[:, None, None])

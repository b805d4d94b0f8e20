"""The mean Jacobian of some samples, whole or of low rank: of a batch, of given states, and along time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from divflow.operators.dense import products_per_pass
from divflow.operators.field import Field, accumulation_dtype, event_size, flatten_event
from divflow.operators.linearization import Linearization, linearize_field

__all__ = ["Matrices", "MeanJacobianCurve", "of_batch", "of_states"]

Rows = Float[Tensor, "times rank size"]

# Seed of the directions that find a range. Probes are never drawn from it, so the two are independent.
_SEED = 0x6D65616E


@dataclass(frozen=True, eq=False)
class Matrices:
    """A matrix C = B^T R of D x D for each of several times.

    Attributes:
        rows: R.
        basis: B, orthonormal, or of two such at neighbouring times; None for the identity, R being all of C.
    """

    rows: Rows
    basis: Rows | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def pullback(self, vectors: Float[Tensor, "products batch *event"]) -> Float[Tensor, "products batch *event"]:
        """v^T C for every vector v, the samples of one time after another."""
        times, _, size = self.rows.shape
        by_time = vectors.to(self.rows.dtype).reshape(len(vectors), times, -1, size)
        coordinates = by_time if self.basis is None else by_time @ self.basis.mT
        return (coordinates @ self.rows).view_as(vectors).to(vectors.dtype)

    def traces(self) -> Float[Tensor, " times"]:
        """The traces of C at all times."""
        if self.basis is None:
            return self.rows.diagonal(dim1=1, dim2=2).sum(dim=1)
        return (self.basis * self.rows).sum(dim=(1, 2))


def of_batch(field: Linearization, x: Tensor, times: int, references: int, rank: int | None = None) -> Matrices:
    """Estimate the mean Jacobian of a batch at each of several times, from a few products with all of it; a constant.

    Sample b gives m consecutive rows of its Jacobian, sample b + 1 the next m, and so on around the D rows. Every row is
    then the mean over at least `references` samples, for `m = references * D / k` products, rounded up. A low rank takes
    m = references * rank / k products forward for the range, and m for its rows.

    Args:
        field: evaluated at x, of more than `references` samples per time; linearized twice for a low rank.
        x: states `(times * k, *event)`, those of one time after another.
        times: how many.
        references: samples that every row is the mean of.
        rank: None for all of it.
    """

    def means(product: Callable[[Tensor], Tensor], vectors: Rows) -> Rows:
        """For every vector the mean of its products, each with the Jacobians of some of the samples."""
        batch, (_, number, size) = len(x) // times, vectors.shape
        count = math.ceil(references * number / batch)
        order = torch.arange(batch * count, device=x.device)
        chosen = vectors[:, order.view(batch, count).T % number].transpose(0, 1)
        chosen = chosen.expand(count, times, batch, size).reshape(count, *x.shape)
        products = torch.cat([product(chunk) for chunk in chosen.split(products_per_pass(x))])
        # In the order of samples, and of the vectors of each: that of vector i is every `number`-th from the i-th on.
        sequence = products.view(count, times, batch, size).permute(1, 2, 0, 3).flatten(1, 2).to(accumulation_dtype(x))
        rounds = math.ceil(batch * count / number)
        padded = torch.nn.functional.pad(sequence, (0, 0, 0, rounds * number - batch * count), value=torch.nan)
        return _mean_of_finite(padded.view(times, rounds, number, size))

    def rows(vectors: Rows) -> Rows:
        return means(lambda chunk: field.pullback(chunk, constant=True), vectors)

    if rank is None:
        return Matrices(rows(torch.eye(event_size(x), dtype=x.dtype, device=x.device)[None]))
    basis = _orthonormal(means(field.pushforward, _directions(rank, x)[None]))
    return Matrices(rows(basis.to(x.dtype)), basis)


@torch.no_grad()
def of_states(g: Field, t: Tensor, states: Tensor, rank: int | None = None) -> Matrices:
    """Compute the mean Jacobian of g at one time and several states, a constant.

    A low rank takes a randomized singular value decomposition with one step of subspace iteration (Halko, Martinsson and
    Tropp 2011, algorithms 4.4 and 5.1): 2 * rank products forward and as many in reverse.

    Args:
        g: the field.
        t: time, `()`.
        states: `(r, *event)`.
        rank: None for all of it.
    """
    field, size = linearize_field(g, t, states, twice=rank is not None), event_size(states)

    def means(product: Callable[[Tensor], Tensor], vectors: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
        shaped = vectors.to(states.dtype).view(len(vectors), 1, *states.shape[1:])
        parts = [
            _mean_of_finite(flatten_event(product(chunk.expand(-1, *states.shape)), 2).to(accumulation_dtype(states)))
            for chunk in shaped.split(products_per_pass(states))
        ]
        return torch.cat(parts)

    if rank is None:
        return Matrices(means(field.pullback, torch.eye(size, dtype=states.dtype, device=states.device))[None])
    basis = _orthonormal(means(field.pushforward, _directions(rank, states)))
    basis = _orthonormal(means(field.pushforward, _orthonormal(means(field.pullback, basis))))
    return Matrices(means(field.pullback, basis)[None], basis[None])


@dataclass(frozen=True, eq=False)
class MeanJacobianCurve:
    """Matrices known at some times, linear in between and constant beyond.

    Attributes:
        times: increasing, `(n,)`, n >= 2.
        matrices: for each of them.
    """

    times: Float[Tensor, " n"]
    matrices: Matrices

    @classmethod
    def through(cls, times: Float[Tensor, " n"], known: Sequence[Matrices]) -> "MeanJacobianCurve":
        """The curve through the matrices at each time, as of `of_states`, all of one rank."""
        bases = [each.basis for each in known if each.basis is not None]
        return cls(times, Matrices(torch.cat([each.rows for each in known]), torch.cat(bases) if bases else None))

    def at(self, times: Float[Tensor, " times"]) -> Matrices:
        """The matrices at other times."""
        times, rows, basis = times.detach().to(self.times).contiguous(), self.matrices.rows, self.matrices.basis
        after = torch.searchsorted(self.times, times).clamp(1, len(self.times) - 1)
        low, high = self.times[after - 1], self.times[after]
        share = ((times - low) / (high - low)).clamp(0, 1).to(rows.dtype)[:, None, None]
        if basis is None:
            return Matrices(torch.lerp(rows[after - 1], rows[after], share))
        return Matrices(
            torch.cat([(1 - share) * rows[after - 1], share * rows[after]], dim=1),
            torch.cat([basis[after - 1], basis[after]], dim=1),
        )


def _mean_of_finite(products: Float[Tensor, "n samples *some size"]) -> Float[Tensor, "n *some size"]:
    """The mean over samples of the finite products, so that one bad sample does not spoil the C of the others."""
    finite = products.isfinite().all(dim=-1, keepdim=True)
    return torch.where(finite, products, 0).sum(dim=1) / finite.sum(dim=1).clamp_min(1)


def _directions(rank: int, x: Tensor) -> Float[Tensor, "rank size"]:
    generator = Generator().manual_seed(_SEED)
    return torch.randn(rank, event_size(x), generator=generator, dtype=torch.float64, device=generator.device).to(x)


def _orthonormal(vectors: Float[Tensor, "*times rank size"]) -> Float[Tensor, "*times rank size"]:
    """As many orthonormal vectors whose span contains these."""
    return torch.linalg.qr(vectors.mT).Q.mT

"""Hutch++ and XTrace by their formulas, in float64, from the Jacobian itself and given random vectors."""

import torch
from torch import Tensor

__all__ = ["hutch_plus_plus", "xtrace"]


def hutch_plus_plus(jacobian: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The estimates `(k,)`, and where they are determined `(k,)`: a sketch of fewer dimensions than its range is not."""
    third = next(n // 3 for n in range(3, 1000) if n - n // 3 == len(vectors))
    estimates, determined = [], []
    for row, a in enumerate(jacobian.mT):
        w = vectors[:, row].double()
        q, rank = _basis(a, w[:third])
        g = w[third:]
        g = g - g @ q @ q.mT
        estimates.append(torch.einsum("di,de,ei->", q, a, q) + torch.einsum("md,de,me->m", g, a, g).mean())
        determined.append(rank == min(third, int(torch.linalg.matrix_rank(a.detach()))))
    return _stacked(estimates, jacobian), torch.tensor(determined, dtype=torch.bool)


def xtrace(jacobian: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The same for XTrace, whose sketches of a lower rank hold the whole range."""
    estimates, count = [], len(vectors)
    for row, a in enumerate(jacobian.mT):
        w, terms = vectors[:, row].double(), []
        for i in range(count):
            q, _ = _basis(a, torch.cat([w[:i], w[i + 1 :]]))
            u = w[i] - q @ (q.mT @ w[i])
            u = u / u.norm()
            terms.append(torch.einsum("di,de,ei->", q, a, q) + (len(a) - count + 1) * u @ a @ u)
        if int(torch.linalg.matrix_rank((a @ w.mT).detach())) < count:  # then the range is that of A itself
            terms = [a.trace()]
        estimates.append(torch.stack(terms).mean())
    return _stacked(estimates, jacobian), torch.ones(len(jacobian), dtype=torch.bool)


def _basis(a: Tensor, w: Tensor) -> tuple[Tensor, int]:
    """Orthonormal columns of the span of A w, and how many there are, held constant."""
    u, s, _ = torch.linalg.svd((a @ w.mT).detach(), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum()) if len(s) and s[0] > 0 else 0
    return u[:, :rank], rank


def _stacked(estimates: list[Tensor], jacobian: Tensor) -> Tensor:
    return torch.stack(estimates) if estimates else jacobian.new_zeros(0)

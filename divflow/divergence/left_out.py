"""The covariance of XTrace's terms, which their spread does not show."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Terms", "covariance"]


class Terms(NamedTuple):
    """The m terms of XTrace for k samples, and what they were made of.

    Attributes:
        terms: X_i, `(m, k)`.
        basis: Q, orthonormal, of the space of all products A w_j, `(m, k, D)`.
        of_basis: A Q, `(m, k, D)`.
        left_out: s_i, the direction of that space that Q_i lacks, in the coordinates of Q, `(m, k, m)`.
        vectors: w_i, `(m, k, D)`.
        rest: (I - Q_i Q_i^T) w_i, `(m, k, D)`.
        of_rest: A of these, `(m, k, D)`.
    """

    terms: Tensor
    basis: Tensor
    of_basis: Tensor
    left_out: Tensor
    vectors: Tensor
    rest: Tensor
    of_rest: Tensor


@torch.no_grad()
def covariance(found: Terms) -> Tensor:
    """Estimate the mean covariance of two terms, `(k,)`: unbiased, and possibly negative.

    Let X_ij be X_i for m - 1 test vectors, without the j-th, and D_ij = X_i - X_ij. The estimate is the mean of D_ij D_ji
    over all pairs. X_ij does not depend on w_j, given all but which X_j has the mean tr A; the same holds for X_ji given
    all but w_j. So in E[D_ij D_ji] = E[(X_i - tr A)(X_j - tr A)] + ... the three other products of deviations vanish.

    Q_ij lacks s_i and the direction v_ij that is orthogonal to it in the plane of s_i and s_j, so everything follows from
    known products: (I - Q_ij Q_ij^T) w_i = (I - Q_i Q_i^T) w_i + v_ij v_ij^T w_i.

    Args:
        found: the terms and what they were computed from.
    """
    count, size = len(found.terms), found.basis.shape[-1]
    missing = found.left_out.transpose(0, 1)
    # Of the vectors s_i in the coordinates of Q: `(k, i, j)`, all that follows.
    within = torch.einsum("akd,bkd->kab", found.basis, found.of_basis)
    bilinear = missing @ within @ missing.mT
    cosines = missing @ missing.mT
    own = bilinear.diagonal(dim1=1, dim2=2)[..., None]
    sines = 1 - cosines.square()
    # If A has so low a rank that both coincide, nothing more is left out.
    apart = torch.where(sines > torch.finfo(sines.dtype).eps ** 0.5, sines.clamp_min(0), torch.inf).rsqrt()

    def along(products: Tensor) -> Tensor:
        """From the products of the vectors s_j with something of each i, `(k, i, j)`, those of v_ij."""
        return (products - cosines * products.diagonal(dim1=1, dim2=2)[..., None]) * apart

    def with_missing(vectors: Tensor, others: Tensor) -> Tensor:
        return torch.einsum("akd,ikd->kia", vectors, others) @ missing.mT

    quadratic = bilinear.diagonal(dim1=1, dim2=2)[:, None] - cosines * (bilinear + bilinear.mT) + cosines.square() * own
    quadratic = quadratic * apart.square()
    of_vectors = along(with_missing(found.basis, found.vectors))
    mixed = along(with_missing(found.basis, found.of_rest)) + along(with_missing(found.of_basis, found.rest))
    rest, of_rest = ((found.rest * other).sum(dim=-1).T[..., None] for other in (found.rest, found.of_rest))
    form = (of_rest + of_vectors * mixed + of_vectors.square() * quadratic) / (rest + of_vectors.square())
    in_range = within.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] - own - quadratic
    differences = found.terms.T[..., None] - in_range - (size - count + 2) * form
    products = differences * differences.mT
    return (products.sum(dim=(1, 2)) - products.diagonal(dim1=1, dim2=2).sum(dim=1)) / (count * (count - 1))

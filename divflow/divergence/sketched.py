"""Hutch++ and XTrace: estimators that find the dominant part of the Jacobian and take its trace exactly.

Both work on A = J^T, whose products A v are vector-Jacobian products; tr A = tr J. All of it is batched: every sample
has its own sketch, a set of products that spans the dominant directions.

**Gradients.** The orthonormal basis Q depends on the field, too, but is held constant (detached). For a fixed Q that
is independent of the probes, both estimates have the expectation tr A whatever Q is, so their gradients have the
expectation grad tr A: they are unbiased. The derivative of Q would only add noise, and would need the derivative of a
QR decomposition, which does not exist for singular A, as of a field that starts at zero.
"""

from abc import abstractmethod
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from divflow.divergence.estimator import Estimate, Estimator, FrozenProbes, Products
from divflow.divergence.exact import Exact
from divflow.divergence.hutchinson import standard_error_of_mean
from divflow.divergence.left_out import Terms, covariance
from divflow.divergence.probes import draw_probes
from divflow.errors import FieldError
from divflow.operators.dense import products_per_pass
from divflow.operators.field import Field, accumulation_dtype, checked_state, event_size, flatten_event

__all__ = ["HutchPlusPlus", "XTrace"]

Vectors = Float[Tensor, "products batch size"]


@dataclass(frozen=True)
class _Sketched(Estimator):
    """An estimator of `num_products` products, exact if these suffice for all dimensions."""

    num_products: int
    stochastic = True
    _least = 1

    def __post_init__(self) -> None:
        if not isinstance(self.num_products, Integral) or self.num_products < self._least:
            raise ValueError(
                f"{type(self).__name__} needs at least {self._least} products, a whole number, but num_products is "
                f"{self.num_products!r}. For fewer, use Hutchinson(num_probes={self.num_products!r})."
            )

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Return the value, the estimate, and its standard error (None if that is unknown)."""
        return self.freeze(x, generator).estimate(g, t, x)

    def freeze(self, x: Tensor, generator: Generator | None = None) -> Estimator:
        """Draw the random vectors for batches of x's shape once; `Exact()` if num_products >= D."""
        if self.num_products >= event_size(checked_state(x)):
            return Exact()
        return _Frozen(self, self._draw(x, generator))

    @abstractmethod
    def _draw(self, x: Tensor, generator: Generator | None) -> Vectors:
        """The random vectors for a batch."""

    @abstractmethod
    def _trace(self, product: "_FlatProducts", vectors: Vectors) -> tuple[Tensor, Tensor | None]:
        """The estimate and its standard error."""


@dataclass(frozen=True)
class HutchPlusPlus(_Sketched):
    """Estimate the divergence by Hutch++: take the trace of the dominant directions exactly, and estimate the rest.

        tr(Q^T A Q) + mean over g of g^T (I - Q Q^T) A (I - Q Q^T) g,      Q = orth(A S),  A = J^T

    (Meyer, Musco, Musco & Woodruff 2021, algorithm 1), batched, differentiable and unbiased. A third of the products each
    goes to the sketch A S, to the trace in its range, and to Hutchinson's estimator of the rest, which also gets the
    remainder of the division by 3.

    - The variance falls as 1 / num_products^2 if the singular values of the Jacobian decay, and is that of
      num_products / 3 probes at worst.
    - The standard error is that of the rest's probes: None for one of them.
    - Two standard errors cover 90 to 92 % of draws with 8 such probes (24 products). With 3 (5 to 9 products) they cover 80
      to 87 %, or 71 to 78 % if the Jacobian is nearly the identity.

    Args:
        num_products: vector-Jacobian products per call, at least 3; from D on the divergence is exact (`Exact()`).

    Raises:
        ValueError: fewer than 3 products.

    Example:
        >>> import torch
        >>> from divflow.divergence import divergence
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> divergence(lambda t, x: x**2, 0.0, x, HutchPlusPlus(num_products=3))  # D products: exact
        tensor([12.])
    """

    _least = 3

    def _draw(self, x: Tensor, generator: Generator | None) -> Vectors:
        return flatten_event(draw_probes("rademacher", self.num_products - self.num_products // 3, x, generator), 2)

    def _trace(self, product: "_FlatProducts", vectors: Vectors) -> tuple[Tensor, Tensor | None]:
        third = self.num_products // 3
        sketch, probes = vectors[:third], vectors[third:]
        basis = _orthonormal(product(sketch, constant=True))
        in_range = _dot(basis, product(basis)).sum(dim=0)
        rest = probes - torch.einsum("ikd,jkd,jke->ike", probes, basis, basis)
        samples = _dot(rest, product(rest))
        return in_range + samples.mean(dim=0), standard_error_of_mean(samples)


@dataclass(frozen=True)
class XTrace(_Sketched):
    """Estimate the divergence by XTrace, which uses every product both for the dominant directions and for the rest.

        mean over i of tr(Q_i^T A Q_i) + (D - m + 1) u_i^T A u_i,      u_i = (I - Q_i Q_i^T) w_i / |(I - Q_i Q_i^T) w_i|

    with A = J^T, m = num_products / 2 (rounded down) test vectors w uniform on the sphere of radius sqrt(D), and Q_i an
    orthonormal basis of all A w_j but the i-th (Epperly, Tropp & Webber 2024, section 2.2). Batched, differentiable and
    unbiased.

    The standard error:

    - The terms share products, so their spread, the paper's estimate of the error, is too small: by up to 39 % if there
      are nearly as many products as dimensions.
    - Here its square is that of the spread plus an unbiased estimate of the covariance of two terms, if that is positive.
    - Its root mean square is that of the error or above it, by up to 75 % if the singular values decay fast.
    - Two standard errors cover 94 to 96 % of draws from m = 14 on, and 77, 86 and 90 % with m = 2, 3 and 4, as Student's t
      does with as few degrees of freedom.

    Args:
        num_products: vector-Jacobian products per call, at least 4, even; from D on the divergence is exact (`Exact()`).

    Raises:
        ValueError: fewer than 4 products.

    Example:
        >>> import torch
        >>> from divflow.divergence import divergence
        >>> divergence(lambda t, x: x**2, 0.0, torch.ones(2, 8), XTrace(num_products=6)).shape
        torch.Size([2])
    """

    _least = 4

    def _draw(self, x: Tensor, generator: Generator | None) -> Vectors:
        return flatten_event(draw_probes("sphere", self.num_products // 2, x, generator), 2)

    def _trace(self, product: "_FlatProducts", vectors: Vectors) -> tuple[Tensor, Tensor | None]:
        count, size = len(vectors), vectors.shape[-1]
        images = product(vectors)
        basis, triangle = _qr(images.detach())
        of_basis = product(basis)
        # Q_i spans what Q does, except the direction s_i in its coordinates, orthogonal to all columns of R but the i-th.
        # A complete QR decomposition gives the right one for any rank: R is singular if A has (nearly) a low rank,
        # and then every Q_i spans A's whole range.
        others = torch.stack([torch.cat([triangle[..., :i], triangle[..., i + 1 :]], dim=-1) for i in range(count)])
        left_out = torch.linalg.qr(others, mode="complete").Q[..., -1].mT
        within = torch.einsum("jkd,lkd->jkl", basis, of_basis)
        in_range = within.diagonal(dim1=0, dim2=2).sum(dim=1) - torch.einsum(
            "ijk,jkl,ilk->ik", left_out, within, left_out
        )
        # u_i before it is normalized is w_i - Q (I - s s^T) Q^T w_i, and A u_i the same combination of products.
        coordinates = torch.einsum("jkd,ikd->ijk", basis, vectors)
        coordinates = coordinates - left_out * (left_out * coordinates).sum(dim=1, keepdim=True)
        rest = vectors - torch.einsum("ijk,jkd->ikd", coordinates, basis)
        of_rest = images - torch.einsum("ijk,jkd->ikd", coordinates, of_basis)
        scale = (size - count + 1) / _dot(rest, rest)
        terms = in_range + scale * _dot(rest, of_rest)
        spread = standard_error_of_mean(terms)
        assert spread is not None  # of two terms at least
        left_out = left_out.transpose(1, 2)
        common = covariance(Terms(terms.detach(), basis, of_basis, left_out, vectors, rest, of_rest))
        return terms.mean(dim=0), (spread.square() + common.clamp_min(0)).sqrt()


@dataclass(frozen=True, eq=False)
class _Frozen(FrozenProbes):
    """A sketched estimator with given random vectors."""

    estimator: _Sketched
    vectors: Vectors

    def check(self, x: Tensor) -> None:
        """Refuse an x of other sizes than those for which the vectors were drawn."""
        if checked_state(x).shape[0] != self.vectors.shape[1] or event_size(x) != self.vectors.shape[2]:
            raise FieldError(
                f"the random vectors were drawn for {self.vectors.shape[1]} samples of {self.vectors.shape[2]} "
                f"dimensions, but x has shape {tuple(x.shape)}. Freeze the estimator for this batch."
            )

    def from_products(self, field: Products, x: Tensor) -> Estimate:
        """The value, the estimate and its standard error."""
        with torch.autocast(x.device.type, enabled=False):
            divergence, error = self.estimator._trace(_FlatProducts(field, x), self.vectors.to(accumulation_dtype(x)))
        return Estimate(field.value, divergence, None if error is None else error.detach())


class _FlatProducts:
    """Products A v = J^T v with flat vectors, in the precision in which the trace is summed."""

    def __init__(self, field: Products, x: Tensor) -> None:
        self._field, self._x = field, x

    def __call__(self, vectors: Vectors, constant: bool = False) -> Vectors:
        """Compute the products; their graph is dropped if they are to be held constant."""
        shaped = vectors.detach().to(self._x.dtype).view(len(vectors), *self._x.shape)
        products = [self._field.pullback(chunk, constant) for chunk in shaped.split(products_per_pass(self._x))]
        return flatten_event(torch.cat(products), 2).to(accumulation_dtype(self._x))


def _qr(vectors: Vectors) -> tuple[Vectors, Tensor]:
    """Orthonormal vectors of the same span, or a larger one, and the triangular factor `(batch, basis, vector)`."""
    q, r = torch.linalg.qr(vectors.movedim(0, -1))
    return q.movedim(-1, 0), r


def _orthonormal(vectors: Vectors) -> Vectors:
    return _qr(vectors.detach())[0]


def _dot(a: Vectors, b: Vectors) -> Float[Tensor, "products batch"]:
    return (a * b).sum(dim=-1)

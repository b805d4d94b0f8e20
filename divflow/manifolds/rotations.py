"""Orientations: the rotations of space, as matrices."""

import math

import torch
from torch import Size, Tensor

from divflow.manifolds.densities import log_wrapped_radial
from divflow.manifolds.series import arcsine_ratio, sine_ratio
from divflow.manifolds.symmetric import Symmetric

__all__ = ["SpecialOrthogonal", "hat", "quaternion", "rotation_matrix", "vee"]

# Enough for float64, of matrices of any condition.
_ITERATIONS = 10


class SpecialOrthogonal(Symmetric):
    """SO(3), rotation matrices R of shape (3, 3).

    The metric is that of the rotation angle: |R hat(w)| = |w|, half of the squared Frobenius norm. Distances are angles in radians, and the
    volume is 8 pi^2. A density with respect to the normalized Haar measure is 8 pi^2 times the one here.

    Example:
        >>> quarter = SpecialOrthogonal().exp(torch.eye(3), hat(torch.tensor([0.0, 0.0, math.pi / 2])))
        >>> SpecialOrthogonal().distance(torch.eye(3), quarter)
        tensor(1.5708)
    """

    def __init__(self) -> None:
        self.event_shape, self.dim = Size([3, 3]), 3

    def __repr__(self) -> str:
        return "SpecialOrthogonal()"

    def project(self, x: Tensor) -> Tensor:
        """The closest orthogonal matrix, which is the polar factor; differentiable to any order.

        It is found by Newton's iteration with scaled steps (Higham 1986).

        Its determinant has the sign of x's: a matrix of negative determinant is no rounded rotation, and `check` refuses it.
        """
        for _ in range(_ITERATIONS):
            cofactors = _cofactors(x)
            inverse = cofactors / ((x * cofactors).sum(dim=(-2, -1), keepdim=True) / 3)
            # Whatever it is scaled by, the polar factor is the same; equal norms make nearly singular matrices converge.
            scale = (_norm(inverse) / _norm(x)).detach().sqrt()
            x = (scale * x + inverse / scale) / 2
        return x

    def to_tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """The product of x and the antisymmetric part of x^T u."""
        a = x.mT @ u
        return x @ (a - a.mT) / 2

    def mean_curvature(self, x: Tensor) -> Tensor:
        """The vector -x."""
        return -x

    def tangents(self, x: Tensor) -> Tensor:
        """The matrices x hat(e_i) / sqrt(2), of norm one as vectors of nine entries, `(3, *batch, 3, 3)`."""
        generators = hat(_eye(x)) / math.sqrt(2)
        return torch.stack([x @ generator for generator in generators])

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The product of x and the matrix exponential of x^T u, by Rodrigues' formula."""
        return x @ _exponential(vee(x.mT @ u))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of x and the antisymmetric logarithm of x^T y, smooth at y = x.

        At an angle of pi it is one of the two shortest ways.
        """
        return x @ hat(_logarithm(x.mT @ y))

    def geodesic(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Turn about the axis of the rotation from x to y."""
        w = _logarithm(x.mT @ y)
        point = x @ _exponential(t[..., None] * w)
        return point, point @ hat(w)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The angle of the rotation from x to y, from 0 to pi; at both ends it has no derivative.

        The formula is 4 atan2(|p - q|, |p + q|) for unit quaternions p of x and q of y, with signs such that they are close.
        """
        p, q = quaternion(x), quaternion(y)
        q = torch.where((p * q).sum(dim=-1, keepdim=True) < 0, -q, q)
        return 4 * torch.atan2(torch.linalg.vector_norm(p - q, dim=-1), torch.linalg.vector_norm(p + q, dim=-1))

    def scale(self, like: Tensor) -> float:
        """1 / sqrt(2): the squared Frobenius norm of R hat(w) is 2 |w|^2."""
        return 0.5**0.5

    @property
    def volume(self) -> float:
        """8 pi^2."""
        return 8 * math.pi**2

    def off(self, x: Tensor) -> Tensor:
        """The largest entry of x - project(x); 2 where the determinant is not positive."""
        away = (x - self.project(x)).abs().flatten(-2).amax(dim=-1)
        return torch.where((x * _cofactors(x)).sum(dim=(-2, -1)) > 0, away, 2.0)

    def draw_uniform(self, shape: Size, like: Tensor) -> Tensor:
        """Independent uniform points."""
        q = torch.randn((*shape, 4), dtype=like.dtype, device=like.device)
        return rotation_matrix(q / torch.linalg.vector_norm(q, dim=-1, keepdim=True))

    def draw_tangent(self, x: Tensor) -> Tensor:
        """Standard normal tangent vectors at x."""
        return x @ hat(torch.randn(x.shape[:-1], dtype=x.dtype, device=x.device))

    def log_wrapped_normal(self, mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
        """The density of mean exp(hat(w)), w ~ N(0, std^2) in R^3, with all turns of its angle.

            p(x) = sum_k (r_k / 2)^2 / sin(r / 2)^2 (2 pi std^2)^(-3/2) exp(-r_k^2 / (2 std^2)),    r_k = r + 2 pi k

        where r is the distance to the mean. By k != 0 it is infinite at the mean: so is the true density.
        """
        q = quaternion(mean.mT @ x)
        return log_wrapped_radial(q[..., 1:].square().sum(dim=-1), q[..., 0], std, self.dim, radius=2.0)


def _exponential(w: Tensor) -> Tensor:
    """The rotation matrices of rotation vectors."""
    q = w.square().sum(dim=-1)[..., None, None]
    half = sine_ratio(q / 4)
    return _eye(w) + sine_ratio(q) * hat(w) + half * half / 2 * (hat(w) @ hat(w))


def _logarithm(rotation: Tensor) -> Tensor:
    """The shortest rotation vectors of rotation matrices."""
    q = quaternion(rotation)
    real, imaginary = q[..., :1], q[..., 1:]
    return 2 * arcsine_ratio(imaginary.square().sum(dim=-1, keepdim=True), real) * imaginary


def hat(w: Tensor) -> Tensor:
    """The matrices `(*batch, 3, 3)` whose products with vectors are the cross products of w with them.

    Args:
        w: `(*batch, 3)`.
    """
    a, b, c = w.unbind(dim=-1)
    zero = torch.zeros_like(a)
    return torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], dim=-1).unflatten(-1, (3, 3))


def vee(m: Tensor) -> Tensor:
    """The w `(*batch, 3)` of the antisymmetric part of a matrix: the inverse of `hat`.

    Args:
        m: `(*batch, 3, 3)`.
    """
    return (
        torch.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], dim=-1) / 2
    )


def quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions `(*batch, 4)` of rotation matrices, the real part first and not negative.

    All four products 4 q_i q are linear in the matrix; the one of the largest q_i is divided by its norm, so that none is lost to rounding.

    Args:
        rotation: `(*batch, 3, 3)`.
    """
    m = rotation
    x, y, z = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    rows = [1 + x + y + z, a, b, c, a, 1 + x - y - z, xy, xz, b, xy, 1 - x + y - z, yz, c, xz, yz, 1 - x - y + z]
    products = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    largest = products.detach().diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = products.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    q = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return torch.where(q[..., :1] < 0, -q, q)


def rotation_matrix(q: Tensor) -> Tensor:
    """Rotation matrices `(*batch, 3, 3)` of unit quaternions.

    Args:
        q: `(*batch, 4)`, the real part first.
    """
    w, v = q[..., 0, None, None], q[..., 1:]
    cross = hat(v)
    return _eye(q) + 2 * (w * cross + cross @ cross)


def _cofactors(m: Tensor) -> Tensor:
    a, b, c = m.unbind(dim=-2)
    return torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-2)


def _norm(m: Tensor) -> Tensor:
    return torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(3, dtype=like.dtype, device=like.device)

"""Gauss-Kronrod quadrature on [0, 1]: nodes, their weights, and those of the embedded Gauss rule."""

import functools
from typing import NamedTuple

import numpy as np

__all__ = ["GaussKronrod", "gauss_kronrod"]


class GaussKronrod(NamedTuple):
    """A rule of 2n + 1 nodes in increasing order; every second one is a node of the n-point Gauss rule.

    The Kronrod rule is exact for polynomials up to degree 3n + 1, the Gauss rule up to 2n - 1. The difference of the two
    estimates the error of the latter.
    """

    nodes: np.ndarray
    kronrod_weights: np.ndarray
    gauss_weights: np.ndarray


@functools.lru_cache
def gauss_kronrod(count: int) -> GaussKronrod:
    """Compute the Gauss-Kronrod rule on [0, 1].

    The Jacobi matrix of the Kronrod rule comes from Laurie's algorithm (Mathematics of Computation 66, 1997, "Calculation
    of Gauss-Kronrod quadrature rules"). Nodes and weights are its eigenvalues and the squared first components of its
    eigenvectors (Golub & Welsch 1969).

    Args:
        count: 2n + 1 nodes, n >= 1.

    Raises:
        ValueError: `count` is even or below 3.
    """
    if count < 3 or count % 2 == 0:
        raise ValueError(f"a Gauss-Kronrod rule needs an odd number of nodes, at least 3, but got {count}")
    n = (count - 1) // 2
    nodes, kronrod = _rule(_kronrod_recurrence(n))
    gauss = np.zeros(count)
    gauss[1::2] = _rule(_legendre_recurrence(n)[1:n])[1]
    return GaussKronrod((nodes + 1) / 2, kronrod, gauss)


def _legendre_recurrence(count: int) -> np.ndarray:
    """The recurrence coefficients b_0 = 1, b_k = k^2 / (4 k^2 - 1) of the Legendre polynomials on [-1, 1]."""
    k = np.arange(1, count + 1, dtype=np.float64)
    return np.concatenate([[1.0], k**2 / (4 * k**2 - 1)])


def _kronrod_recurrence(n: int) -> np.ndarray:
    """b_1, ..., b_2n of the Kronrod rule's Jacobi matrix (Laurie's mixed moments; all a_k are zero by symmetry)."""
    b = np.zeros(2 * n + 1)
    known = (3 * n + 1) // 2
    b[: known + 1] = _legendre_recurrence(known)[: known + 1]
    s, t = np.zeros(n // 2 + 2), np.zeros(n // 2 + 2)
    t[1] = b[n + 1]
    for m in range(n - 1):
        k = np.arange((m + 1) // 2, -1, -1)
        s[k + 1] = np.cumsum(b[k + n + 1] * s[k] - b[m - k] * s[k + 1])
        s, t = t, s
    s[1 : n // 2 + 2] = s[: n // 2 + 1].copy()
    for m in range(n - 1, 2 * n - 2):
        k = np.arange(m + 1 - n, (m - 1) // 2 + 1)
        j = n - 1 - m + k
        s[j + 1] = np.cumsum(-b[k + n + 1] * s[j + 1] + b[m - k] * s[j + 2])
        if m % 2:
            middle = (m + 1) // 2
            b[middle + n + 1] = s[j[-1] + 1] / s[j[-1] + 2]
        s, t = t, s
    return b[1:]


def _rule(recurrence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    off_diagonal = np.sqrt(recurrence)
    nodes, vectors = np.linalg.eigh(np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    nodes, weights = (nodes - nodes[::-1]) / 2, vectors[0] ** 2
    return nodes, (weights + weights[::-1]) / 2

"""Laplacians of plain functions: carried forward with value and gradient, or by products with the Hessian."""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.errors import FieldError
from divflow.operators.derivatives import gradient
from divflow.operators.field import Field
from divflow.operators.forward_laplacian import SeveralNumbersError, ValueGradientLaplacian, explain
from divflow.operators.forward_laplacian import value_gradient_laplacian as at_time
from divflow.operators.plan import Plan

__all__ = ["explain_laplacian", "laplacian", "value_gradient_laplacian"]


class TraceEstimator(Protocol):
    """Anything that computes the divergence of a field, such as an estimator of `divflow.divergence`."""

    def __call__(self, g: Field, t: Tensor | float, x: Tensor) -> Any:
        """Return a value and a divergence `(k,)`, as attributes of these names."""


def laplacian(
    f: Callable[[Tensor], Tensor], x: Tensor, estimator: TraceEstimator | None = None
) -> Float[Tensor, "k ..."]:
    """Compute the Laplacian of a function at every sample, the divergence of its gradient.

        (lap f)_b = sum_i d^2 f(x)_b / d x[b, i]^2

    If the operations of f have rules, the exact Laplacian is carried forward with value and gradient, at a third of the
    cost of D products with the Hessian (`value_gradient_laplacian` returns all three). Any other function takes these
    products. `explain_laplacian` reports which, and why. Differentiable in x and parameters.

    Args:
        f: `f(x) -> (k,)`, or `(k, *out)`, which is evaluated once for each output and once more; real with an estimator.
        x: states `(k, *event)`.
        estimator: of the divergence of the gradient; the exact Laplacian if None.

    Returns:
        `(k,)`, or `(k, *out)`, the Laplacian of each output.

    Raises:
        FieldError: f does not return one row per sample, or mixes samples, or x is not a floating-point tensor.

    Example:
        >>> laplacian(lambda x: (x**3).sum(dim=1), torch.tensor([[1.0, 2.0]]))
        tensor([18.])
        >>> laplacian(lambda x: torch.stack([(x**2).sum(dim=1), x[:, 0]], dim=1), torch.tensor([[1.0, 2.0]]))
        tensor([[4., 0.]])
    """
    try:
        return _laplacian(f, x, estimator)
    except SeveralNumbersError as error:
        shape = error.shape
    outputs = range(math.prod(shape[1:]))
    each = [_laplacian(functools.partial(_output, f, number), x, estimator) for number in outputs]
    return torch.stack(each, dim=1).view(shape) if each else x.new_zeros(shape)


def _laplacian(f: Callable[[Tensor], Tensor], x: Tensor, estimator: TraceEstimator | None) -> Tensor:
    if estimator is not None:
        return estimator(lambda _, z: _real(gradient(f, z)), 0.0, x).divergence
    return value_gradient_laplacian(f, x).laplacian


def _output(f: Callable[[Tensor], Tensor], number: int, x: Tensor) -> Tensor:
    return f(x).flatten(1)[:, number]


def value_gradient_laplacian(f: Callable[[Tensor], Tensor], x: Tensor) -> ValueGradientLaplacian:
    """Compute value, gradient and Laplacian of a scalar function together, from one evaluation.

    Args:
        f: `f(x) -> (k,)`.
        x: states `(k, *event)`.

    Returns:
        `ValueGradientLaplacian` of f(x) `(k,)`, its gradient `(k, *event)` and its Laplacian `(k,)`.

    Raises:
        FieldError: as `laplacian`.

    Example:
        The local energy of variational Monte Carlo, E_L = -1/2 (lap log psi + |grad log psi|^2) + V, of n particles in
        a harmonic trap, V = 1/2 |x|^2, in atomic units. For psi = exp(-a |x|^2 / 2) in d dimensions it is
        a n d / 2 + (1 - a^2) |x|^2 / 2. In the ground state, a = 1, it is n d / 2 everywhere:

        >>> def log_psi(x):
        ...     return -0.5 * a * (x**2).sum(dim=(1, 2))
        >>> def local_energy(x):
        ...     _, gradient, laplacian = value_gradient_laplacian(log_psi, x)
        ...     return -0.5 * (laplacian + (gradient**2).sum(dim=(1, 2))) + 0.5 * (x**2).sum(dim=(1, 2))
        >>> a, x = 1.0, torch.tensor([[[0.5, 0.0, 1.0], [2.0, -1.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
        >>> local_energy(x)
        tensor([3., 3.])
        >>> a = 0.5
        >>> local_energy(x)
        tensor([3.8438, 3.0000])
    """
    return at_time(lambda _, z: f(z), 0.0, x)


def explain_laplacian(f: Callable[[Tensor], Tensor], x: Tensor) -> Plan:
    """Report how `laplacian(f, x)` is computed, why, and what it is expected to cost, relative to f.

    f is evaluated, unless its plan is known.

    Args:
        f: `f(x) -> (k,)`.
        x: states `(k, *event)`.

    Returns:
        A `Plan` whose method is "forward_laplacian", or "reverse" for products with the Hessian.

    Example:
        >>> explain_laplacian(lambda x: x.sin().prod(dim=1), torch.ones(2, 3)).method
        'forward_laplacian'
        >>> explain_laplacian(lambda x: x.cumprod(dim=1)[:, -1], torch.ones(2, 3)).why
        'dense products: it takes longer (cumprod has no rule: through products of its own)'
    """
    return explain(lambda _, z: f(z), 0.0, x)


def _real(value: Tensor) -> Tensor:
    if value.is_complex():
        raise FieldError(
            f"an estimator needs a real function, but f returns {value.dtype}, which is complex. Take the Laplacians of its real and "
            "its imaginary part, or leave out the estimator: both are then exact."
        )
    return value

"""Derivatives of plain functions, per sample and for tensors of any shape.

Each function takes the function to differentiate, not its result, so nothing can be "not in the graph";
it leaves its arguments alone (no `.grad`, no `requires_grad_`, whatever the function writes to what it is given), works
under `torch.no_grad` and `torch.inference_mode`, and with grad enabled is differentiable again.

Arguments are real. Of a complex function, such as a wave function, the derivatives of both parts are taken, and returned as
complex ones: d/dx (u + i v) = du/dx + i dv/dx.
"""

import contextlib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import FieldError
from divflow.operators.compiled import eagerly
from divflow.operators.context import Context, mapped, named_tensors
from divflow.operators.dense import products_per_pass
from divflow.operators.field import Field, as_time, checked_state
from divflow.operators.forward_laplacian import (
    SeveralNumbersError,
    ValueGradientLaplacian,
    explain,
    one_number_a_sample,
)
from divflow.operators.forward_laplacian import value_gradient_laplacian as at_time
from divflow.operators.linearization import linearize
from divflow.operators.operands import Parts, description, plain
from divflow.operators.plan import Plan

__all__ = [
    "explain_laplacian",
    "flat_gradient",
    "gradient",
    "hessian",
    "jacobian",
    "laplacian",
    "partial_derivative",
    "value_gradient_laplacian",
]


class TraceEstimator(Protocol):
    """What takes the divergence of a field, such as an estimator of `divflow.divergence`."""

    def __call__(self, g: Field, t: Tensor | float, x: Tensor) -> Any:
        """A value and a divergence `(k,)`, by these names."""


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of a scalar function of each sample: `f(x) -> (k,)`, x `(k, *event)`, result `(k, *event)`.

    Raises:
        FieldError: f does not return one number a sample, or x is not a floating-point tensor.

    Example:
        >>> x = torch.tensor([[2.0, 3.0]])
        >>> gradient(lambda x: (x**2).sum(dim=1), x)
        tensor([[4., 6.]])
    """
    return _slope(f, checked_state(x), one_number_a_sample)


def flat_gradient(f: Callable[..., Tensor], tensors: Tensor | Iterable[Tensor]) -> Float[Tensor, " n"]:
    """Gradient of one scalar `f(*tensors)`, flattened and concatenated over the tensors in their order.

    Args:
        f: of as many tensors as there are.
        tensors: several, such as `net.parameters()`, or one.

    Raises:
        FieldError: f does not return one scalar, or there is no tensor, or one is not floating-point.

    Example:
        >>> a, b = torch.tensor([2.0, 3.0]), torch.tensor([6.0, 4.0])
        >>> flat_gradient(lambda a, b: (3 * a**3 - b**2).sum(), [a, b])
        tensor([ 36.,  81., -12.,  -8.])
    """
    given: Any = [tensors] if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable) else list(tensors)
    if not given:
        raise FieldError("flat_gradient needs at least one tensor, but was given none")
    for tensor in given:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = str(tensor.dtype) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}, {tensor!r}"
            raise FieldError(f"flat_gradient takes tensors of a floating dtype, but one is {found}")
    tensors = given
    sizes = [tensor.numel() for tensor in tensors]

    def of_flat(flat: Tensor) -> Tensor:
        parts = (part.view(tensor.shape) for part, tensor in zip(flat[0].split(sizes), tensors, strict=True))
        return f(*(part.to(tensor.dtype, copy=True) for part, tensor in zip(parts, tensors, strict=True)))

    def scalar(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise FieldError(f"f must return one scalar, but returned {description(value)}; sum or average it")
        return value.reshape(1)

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).unsqueeze(0)
    return _slope(of_flat, flat, scalar)[0]


def jacobian(g: Callable[..., Tensor], t: Tensor | float, x: Tensor, *, context: Context | None = None) -> Tensor:
    """The Jacobian of a tensor-valued g(t, x): `J[b, i, j] = d g(t, x)[b, i] / d x[b, j]`.

    Args:
        g: a field; its value may have another event shape than x, `(k, *out)`.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)`.
        context: what g is called with beside t and x, `g(t, x, context)`: a tensor or a tree of tensors.

    Returns:
        `(k, *out, *event)`, which is `(k, *event, *event)` for a field of x's shape. Cost: one
        evaluation and prod(out) products.

    Raises:
        FieldError: x, t or the value is not what the definition needs.

    Example:
        >>> x = torch.tensor([[2.0, 3.0]])
        >>> jacobian(lambda t, x: torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], dim=1), 0.0, x)
        tensor([[[4., 0.],
                 [3., 2.],
                 [0., 6.]]])
    """
    x = checked_state(x)
    t = as_time(t, x)
    named_tensors(context)  # whose other leaves are refused
    return _all_rows(lambda z: g(t.clone(), z, *([] if context is None else [mapped(Tensor.clone, context)])), x)


def hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Second derivatives of each sample's f: `f(x) -> (k, *out)`, result `(k, *out, *event, *event)`.

    Raises:
        FieldError: f does not return one value a sample, or x is not a floating-point tensor.

    Example:
        >>> hessian(lambda x: (x**3).sum(dim=1), torch.tensor([[1.0, 2.0]]))
        tensor([[[ 6.,  0.],
                 [ 0., 12.]]])
    """
    return jacobian(lambda t, y: jacobian(lambda _, z: f(z), t, y), 0.0, x)


def laplacian(
    f: Callable[[Tensor], Tensor], x: Tensor, estimator: TraceEstimator | None = None
) -> Float[Tensor, "k ..."]:
    """The Laplacian of a function of each sample, the divergence of its gradient: `(k,)`, or `(k, *out)` of each of its outputs.

    Exact, it is carried forward with value and gradient (`value_gradient_laplacian`, which has them all) where the
    operations of f have rules, at a third of the cost of D products with the Hessian; anything else takes these.
    `explain_laplacian` says which, and why. Differentiable in x and parameters.

    Args:
        f: `f(x) -> (k,)`, or `(k, *out)`, which is evaluated once for each output and once more; real where there is an
            estimator.
        x: states `(k, *event)`.
        estimator: of the divergence of the gradient; the exact Laplacian if None.

    Raises:
        FieldError: f does not return one row a sample, or mixes samples, or x is not a floating-point tensor.

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
    """f(x) `(k,)`, its gradient `(k, *event)` and its Laplacian `(k,)`, from one evaluation.

    Args:
        f: `f(x) -> (k,)`.
        x: states `(k, *event)`.

    Raises:
        FieldError: as `laplacian`.

    Example:
        The local energy of variational Monte Carlo, E_L = -1/2 (lap log psi + |grad log psi|^2) + V, of n particles in
        a harmonic trap, V = 1/2 |x|^2, in atomic units. For psi = exp(-a |x|^2 / 2) it is a n d / 2 + (1 - a^2) |x|^2 / 2
        in d dimensions, and the same everywhere, n d / 2, in the ground state, a = 1:

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
    """How `laplacian(f, x)` is computed, why, and what it is expected to cost, relative to f.

    Its method is "forward_laplacian", or "reverse" for products with the Hessian. f is evaluated, unless that is known.

    Example:
        >>> explain_laplacian(lambda x: x.sin().prod(dim=1), torch.ones(2, 3)).method
        'forward_laplacian'
        >>> explain_laplacian(lambda x: x.cumprod(dim=1)[:, -1], torch.ones(2, 3)).why
        'dense products: it takes longer (cumprod has no rule: through products of its own)'
    """
    return explain(lambda _, z: f(z), 0.0, x)


def partial_derivative(f: Callable[..., Tensor], inputs: Iterable[Tensor | float], wrt: int | str) -> Tensor:
    """Elementwise derivative of `f(*inputs)` in input number `wrt`, the inputs broadcast together.

    Where `autograd.grad` sums over the dimensions along which an input was broadcast, this returns the
    derivative at every place of the output. f must act elementwise.

    Args:
        f: of as many arguments as there are inputs.
        inputs: tensors, or numbers.
        wrt: the number of an input, counted from 0, or the name that f has for it.

    Raises:
        FieldError: no such input, the inputs don't broadcast, or f's output has not the broadcast shape.

    Example:
        >>> t, k = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2.0, 3.0])
        >>> partial_derivative(lambda t, k: t * k + 2 * t * k**2, [t, k], wrt=1)
        tensor([[ 9., 13.],
                [18., 26.],
                [36., 52.]])
        >>> partial_derivative(lambda t, k: t * k + 2 * t * k**2, [1.0, 2.0], wrt="k")
        tensor(9.)
    """
    given = _as_tensors(inputs)
    wrt = _number_of(f, wrt, len(given))
    try:
        arguments = list(torch.broadcast_tensors(*(plain(tensor) for tensor in given)))
    except RuntimeError as error:
        shapes = [tuple(tensor.shape) for tensor in given]
        raise FieldError(f"the inputs don't broadcast together: their shapes are {shapes}") from error
    shape = arguments[wrt].shape

    def of_input(z: Tensor) -> Tensor:
        others = [argument.clone() for argument in arguments]  # f's own, where it works in place
        return f(*others[:wrt], z[0].clone(), *others[wrt + 1 :])

    def same_shape(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != shape:
            raise FieldError(
                f"f must act elementwise, so its output must have the inputs' common shape {tuple(shape)}, "
                f"but it is {description(value)}"
            )
        return value.unsqueeze(0)

    return _slope(of_input, checked_state(arguments[wrt].unsqueeze(0)), same_shape)[0]


def _as_tensors(inputs: Iterable[Tensor | float]) -> list[Tensor]:
    """The inputs, of which numbers take the dtype and device of the first tensor of floats."""
    given = list(inputs)
    like = next((it for it in given if isinstance(it, Tensor) and it.is_floating_point()), torch.tensor(0.0))
    for number in given:
        if not isinstance(number, Tensor) and (isinstance(number, bool) or not isinstance(number, numbers.Real)):
            raise FieldError(f"the inputs must be tensors or numbers, but one is a {type(number).__name__}, {number!r}")
    return [it if isinstance(it, Tensor) else like.new_full((), float(it)) for it in given]


def _number_of(f: Callable[..., Tensor], wrt: int | str, count: int) -> int:
    """The number of an input, counted from 0."""
    names: list[str] = []
    if isinstance(wrt, str):
        with contextlib.suppress(TypeError, ValueError):  # some built-in functions have no signature
            names = list(inspect.signature(f.forward if isinstance(f, nn.Module) else f).parameters)[:count]
        if wrt in names:
            return names.index(wrt)
    elif isinstance(wrt, int) and not isinstance(wrt, bool) and -count <= wrt < count:
        return wrt % count
    known = f", or one of their names, {', '.join(names)}" if names else ""
    raise FieldError(f"wrt must be the number of one of the {count} inputs, counted from 0{known}, but is {wrt!r}")


@eagerly
def _slope(function: Callable[[Tensor], Tensor], x: Tensor, check: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The derivative of the sum of the values in x."""
    parts = Parts(check)
    return parts.slope(linearize(function, x, parts), x)


@eagerly
def _all_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Every row of the Jacobian, `(k, *out, *event)`."""
    parts = Parts(_one_value_a_sample)
    at = linearize(function, x, parts)
    out = at.value.shape[1:]
    size = math.prod(out)
    if size == 0 or x.numel() == 0:
        return parts.joined(x.new_zeros(*at.value.shape, *x.shape[1:]), -x.ndim)
    basis = torch.eye(size, dtype=at.value.dtype, device=x.device).view(size, 1, *out)
    rows = [at.pullback(vectors.expand(len(vectors), *at.value.shape)) for vectors in basis.split(products_per_pass(x))]
    return parts.joined(torch.cat(rows).movedim(0, 1).reshape(*at.value.shape, *x.shape[1:]), -x.ndim)


def _real(value: Tensor) -> Tensor:
    if value.is_complex():
        raise FieldError(
            f"an estimator takes the divergence of real fields, but f returns {value.dtype}, which is complex; take the Laplacians of "
            "its real and its imaginary part, or both exactly, without estimator"
        )
    return value


def _one_value_a_sample(value: Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape[:1] != x.shape[:1]:
        raise FieldError(
            f"the function must return one value a sample, ({x.shape[0]}, *out), but returned {description(value)}"
        )
    return value

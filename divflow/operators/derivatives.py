"""Derivatives of plain functions, per sample and for tensors of any shape.

Each function takes the function to differentiate, not its result, so nothing can be "not in the graph".

- It leaves its arguments alone: no `.grad`, no `requires_grad_`, whatever the function writes to its inputs.
- It works under `torch.no_grad` and `torch.inference_mode`.
- With grad enabled its result is differentiable again.

Arguments are real. For a complex function, such as a wave function, the derivatives of both parts are returned as
complex ones: d/dx (u + i v) = du/dx + i dv/dx.
"""

import contextlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import FieldError
from divflow.operators.compiled import eagerly
from divflow.operators.context import Context, mapped, named_tensors
from divflow.operators.dense import products_per_pass
from divflow.operators.field import as_time, called, checked_state
from divflow.operators.forward_laplacian import (
    one_number_a_sample,
)
from divflow.operators.linearization import linearize
from divflow.operators.operands import Parts, description, plain

__all__ = [
    "flat_gradient",
    "gradient",
    "hessian",
    "jacobian",
    "partial_derivative",
]


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute the gradient of a scalar function at every sample of a batch.

        gradient(f, x)[b] = d f(x)[b] / d x[b]

    Args:
        f: `f(x) -> (k,)`, real or complex.
        x: states `(k, *event)`.

    Returns:
        `(k, *event)`.

    Raises:
        FieldError: f does not return one number per sample, or x is not a floating-point tensor.

    Example:
        >>> x = torch.tensor([[2.0, 3.0]])
        >>> gradient(lambda x: (x**2).sum(dim=1), x)
        tensor([[4., 6.]])
    """
    return _slope(f, checked_state(x), one_number_a_sample)


def flat_gradient(f: Callable[..., Tensor], tensors: Tensor | Iterable[Tensor]) -> Float[Tensor, " n"]:
    """Compute the gradient of one scalar in several tensors, flattened and concatenated in their order.

    Args:
        f: `f(*tensors)`, a scalar.
        tensors: several, such as `net.parameters()`, or one.

    Returns:
        `(n,)`, n being the number of all their entries.

    Raises:
        FieldError: f does not return one scalar; there is no tensor, or one of another dtype than floating-point.

    Example:
        >>> a, b = torch.tensor([2.0, 3.0]), torch.tensor([6.0, 4.0])
        >>> flat_gradient(lambda a, b: (3 * a**3 - b**2).sum(), [a, b])
        tensor([ 36.,  81., -12.,  -8.])
    """
    given: Any = [tensors] if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable) else list(tensors)
    if not given:
        raise FieldError("flat_gradient needs at least one tensor, but got none")
    for tensor in given:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = str(tensor.dtype) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}, {tensor!r}"
            raise FieldError(f"flat_gradient needs tensors of a floating dtype, but one is {found}")
    tensors = given
    sizes = [tensor.numel() for tensor in tensors]

    def of_flat(flat: Tensor) -> Tensor:
        parts = (part.view(tensor.shape) for part, tensor in zip(flat[0].split(sizes), tensors, strict=True))
        return f(*(part.to(tensor.dtype, copy=True) for part, tensor in zip(parts, tensors, strict=True)))

    def scalar(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise FieldError(f"f must return one scalar, but returned {description(value)}. Sum or average it.")
        return value.reshape(1)

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).unsqueeze(0)
    return _slope(of_flat, flat, scalar)[0]


def jacobian(g: Callable[..., Tensor], t: Tensor | float, x: Tensor, *, context: Context | None = None) -> Tensor:
    """Compute the Jacobian of a tensor-valued function at every sample of a batch.

        J[b, i, j] = d g(t, x)[b, i] / d x[b, j]

    Args:
        g: `g(t, x)`; its value may have another event shape than x, `(k, *out)`.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)`.
        context: passed to g as `g(t, x, context)`: a tensor or a tree of tensors.

    Returns:
        `(k, *out, *event)`, which is `(k, *event, *event)` for a field of x's shape. Cost: one evaluation and prod(out)
        products.

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
    named_tensors(context)  # refuses other leaves
    given = () if context is None else (context,)
    return _all_rows(lambda z: called(g, t.clone(), z, *mapped(Tensor.clone, given)), x)


def hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute the second derivatives of a function at every sample of a batch.

        H[b, o, i, j] = d^2 f(x)[b, o] / d x[b, i] d x[b, j]

    Args:
        f: `f(x) -> (k, *out)`.
        x: states `(k, *event)`.

    Returns:
        `(k, *out, *event, *event)`.

    Raises:
        FieldError: f does not return one value per sample, or x is not a floating-point tensor.

    Example:
        >>> hessian(lambda x: (x**3).sum(dim=1), torch.tensor([[1.0, 2.0]]))
        tensor([[[ 6.,  0.],
                 [ 0., 12.]]])
    """
    return jacobian(lambda t, y: jacobian(lambda _, z: f(z), t, y), 0.0, x)


def partial_derivative(f: Callable[..., Tensor], inputs: Iterable[Tensor | float], wrt: int | str) -> Tensor:
    """Compute the elementwise derivative of a function in one of several inputs, which are broadcast together.

    `autograd.grad` sums over the dimensions along which an input was broadcast. This returns the derivative at every
    place of the output. f must act elementwise.

    Args:
        f: `f(*inputs)`.
        inputs: tensors, or numbers.
        wrt: the number of an input, counted from 0, or its name in f's signature.

    Returns:
        A tensor of the output's shape.

    Raises:
        FieldError: no such input, inputs that don't broadcast, or an output of another shape than the broadcast one.

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
        others = [argument.clone() for argument in arguments]  # copies, in case f works in place
        return f(*others[:wrt], z[0].clone(), *others[wrt + 1 :])

    def same_shape(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != shape:
            raise FieldError(
                f"f must act elementwise, with an output of the inputs' common shape {tuple(shape)}, "
                f"but it returned {description(value)}"
            )
        return value.unsqueeze(0)

    return _slope(of_input, checked_state(arguments[wrt].unsqueeze(0)), same_shape)[0]


def _as_tensors(inputs: Iterable[Tensor | float]) -> list[Tensor]:
    """The inputs as tensors; numbers take the dtype and device of the first floating-point tensor."""
    given = list(inputs)
    like = next((it for it in given if isinstance(it, Tensor) and it.is_floating_point()), torch.tensor(0.0))
    for number in given:
        if not isinstance(number, Tensor) and (isinstance(number, bool) or not isinstance(number, numbers.Real)):
            raise FieldError(f"the inputs must be tensors or numbers, but one is a {type(number).__name__}, {number!r}")
    return [it if isinstance(it, Tensor) else like.new_full((), float(it)) for it in given]


def _number_of(f: Callable[..., Tensor], wrt: int | str, count: int) -> int:
    """The number of an input, counted from 0, by its number or name."""
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


def _one_value_a_sample(value: Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape[:1] != x.shape[:1]:
        raise FieldError(
            f"the function must return one value per sample, ({x.shape[0]}, *out), but returned {description(value)}"
        )
    return value

"""Derivatives of plain functions, per sample and for tensors of any shape.

Each function takes the function to differentiate, not its result, so nothing can be "not in the graph";
it leaves its arguments alone (no `.grad`, no `requires_grad_`, whatever the function writes to what it is given), works
under `torch.no_grad` and `torch.inference_mode`, and with grad enabled is differentiable again.

Arguments are real. Of a complex function, such as a wave function, the derivatives of both parts are taken, and returned as
complex ones: d/dx (u + i v) = du/dx + i dv/dx.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from divflow.divergence.compiled import eagerly
from divflow.divergence.dense import products_per_pass
from divflow.divergence.estimator import Estimator
from divflow.divergence.field import (
    Field,
    FieldError,
    as_time,
    checked_state,
    linearize,
)
from divflow.divergence.plan import Plan
from divflow.laplacian import ValueGradientLaplacian, explain, one_number_a_sample
from divflow.laplacian import value_gradient_laplacian as at_time
from divflow.operands import Parts, check_parameters, description, plain

__all__ = [
    "explain_laplacian",
    "flat_gradient",
    "gradient",
    "hessian",
    "jacobian",
    "laplacian",
    "parameter_jacobian",
    "partial_derivative",
    "value_gradient_laplacian",
]


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


def flat_gradient(f: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """Gradient of one scalar `f(*tensors)`, flattened and concatenated over the tensors in their order.

    Raises:
        FieldError: f does not return one scalar, or there is no tensor, or one is not floating-point.

    Example:
        >>> a, b = torch.tensor([2.0, 3.0]), torch.tensor([6.0, 4.0])
        >>> flat_gradient(lambda a, b: (3 * a**3 - b**2).sum(), [a, b])
        tensor([ 36.,  81., -12.,  -8.])
    """
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        raise FieldError("flat_gradient needs at least one tensor, and all of a floating dtype")
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


def jacobian(g: Field, t: Tensor | float, x: Tensor) -> Tensor:
    """The Jacobian of a tensor-valued g(t, x): `J[b, i, j] = d g(t, x)[b, i] / d x[b, j]`.

    Args:
        g: a field; its value may have another event shape than x, `(k, *out)`.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)`.

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
    return _all_rows(lambda z: g(t.clone(), z), x)


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


def laplacian(f: Callable[[Tensor], Tensor], x: Tensor, estimator: Estimator | None = None) -> Float[Tensor, " k"]:
    """The Laplacian of a scalar function of each sample, the divergence of its gradient: `(k,)`.

    Exact, it is carried forward with value and gradient (`value_gradient_laplacian`, which has them all) where the
    operations of f have rules, at a third of the cost of D products with the Hessian; anything else takes these.
    `explain_laplacian` says which, and why. Differentiable in x and parameters.

    Args:
        f: `f(x) -> (k,)`; real where there is an estimator.
        x: states `(k, *event)`.
        estimator: of the divergence of the gradient; the exact Laplacian if None.

    Raises:
        FieldError: f does not return one number a sample, or mixes samples, or x is not a floating-point tensor.

    Example:
        >>> laplacian(lambda x: (x**3).sum(dim=1), torch.tensor([[1.0, 2.0]]))
        tensor([18.])
    """
    if estimator is not None:
        return estimator(lambda _, z: _real(gradient(f, z)), 0.0, x).divergence
    return value_gradient_laplacian(f, x).laplacian


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
        >>> explain_laplacian(lambda x: x.amax(dim=1), torch.ones(2, 3)).why
        'dense products: amax has no rule'
    """
    return explain(lambda _, z: f(z), 0.0, x)


def partial_derivative(f: Callable[..., Tensor], inputs: Sequence[Tensor], wrt: int) -> Tensor:
    """Elementwise derivative of `f(*inputs)` in input number `wrt`, the inputs broadcast together.

    Where `autograd.grad` sums over the dimensions along which an input was broadcast, this returns the
    derivative at every place of the output. f must act elementwise.

    Raises:
        FieldError: no such input, the inputs don't broadcast, or f's output has not the broadcast shape.

    Example:
        >>> t, k = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2.0, 3.0])
        >>> partial_derivative(lambda t, k: t * k + 2 * t * k**2, [t, k], wrt=1)
        tensor([[ 9., 13.],
                [18., 26.],
                [36., 52.]])
    """
    if not -len(inputs) <= wrt < len(inputs):
        raise FieldError(f"wrt must be the number of one of the {len(inputs)} inputs, but is {wrt}")
    try:
        arguments = list(torch.broadcast_tensors(*(plain(tensor) for tensor in inputs)))
    except RuntimeError as error:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        raise FieldError(f"the inputs don't broadcast together: their shapes are {shapes}") from error
    shape = arguments[wrt].shape

    def of_input(z: Tensor) -> Tensor:
        others = [argument.clone() for argument in arguments]  # f's own, where it works in place
        return f(*others[:wrt], z[0].clone(), *others[wrt:][1:])

    def same_shape(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != shape:
            raise FieldError(
                f"f must act elementwise, so its output must have the inputs' common shape {tuple(shape)}, "
                f"but it is {description(value)}"
            )
        return value.unsqueeze(0)

    return _slope(of_input, checked_state(arguments[wrt].unsqueeze(0)), same_shape)[0]


def parameter_jacobian(
    f: nn.Module | Callable[..., Tensor],
    *inputs: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Per-sample derivatives with respect to parameters, without a loop over the batch.

        result[name][b] = d f(inputs[b]) / d parameters[name]

    Args:
        f: a module, or a function `f(parameters, *inputs)`; called with batches of one sample.
        inputs: tensors of leading dimension k, or scalars that all samples share.
        parameters: for a function the tensors by name; for a module a selection by name (all if None).
        chunk_size: samples at a time; None takes all at once.

    Returns:
        name: `(k, *out, *parameter)`.

    Raises:
        FieldError: no parameters, names that are none of the module's parameters or buffers, parameters that are not of a
            floating dtype, no input with a batch, inputs of different batch sizes, or samples without one value each.

    Example:
        >>> x = torch.tensor([3.0, 5.0])
        >>> p = {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}
        >>> parameter_jacobian(lambda p, x: p["a"] * x + p["b"], x, parameters=p)
        {'a': tensor([3., 5.]), 'b': tensor([1., 1.])}
    """
    if isinstance(f, nn.Module):
        module, function = f, lambda p, *args: functional_call(module, p, args)
        parameters = dict(f.named_parameters()) if parameters is None else parameters
    else:
        function = f
    if not parameters:
        raise FieldError("there are no parameters: give a module that has some, or `parameters`, a dict of tensors")
    check_parameters(f, parameters, inputs)
    sizes = {len(tensor) for tensor in inputs if tensor.ndim}
    if len(sizes) != 1:
        raise FieldError(f"the inputs must share one batch size in dimension 0, but have {sorted(sizes)}")

    def one_value(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape[:1] != (1,):
            raise FieldError(
                f"f must return one value a sample, (k, *out), but for one sample it is {description(value)}"
            )
        return value[0]

    parts = Parts(one_value)

    def of_sample(p: dict[str, Tensor], *sample: Tensor) -> Tensor:
        # Copies, which f may write to.
        batches = [(s.unsqueeze(0) if tensor.ndim else s).clone() for s, tensor in zip(sample, inputs, strict=True)]
        return parts(function({name: value.clone() for name, value in p.items()}, *batches), batches[0])

    if sizes == {0}:  # the shapes are those of one sample, which an empty batch can't tell
        like = (tensor.new_zeros(1, *tensor.shape[1:]) if tensor.ndim else tensor for tensor in inputs)
        derivatives = parameter_jacobian(f, *like, parameters=parameters if parameters else None)
        return {name: derivative[:0] for name, derivative in derivatives.items()}
    in_dims = (None, *(0 if tensor.ndim else None for tensor in inputs))
    if not torch.is_grad_enabled():  # jacrev enables it again
        parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    try:
        with torch.inference_mode(False):
            found = vmap(jacrev(of_sample), in_dims=in_dims, chunk_size=chunk_size)(
                dict(parameters), *(plain(tensor) for tensor in inputs)
            )
        return {name: parts.joined(found[name], -1 - parameters[name].ndim) for name in found}
    except RuntimeError as error:
        if not any(word in str(error) for word in ("functorch", "vmap", "functional transform")):
            raise  # f's own
        raise FieldError(
            f"torch can't take f's derivatives for all samples at once: {str(error).splitlines()[0]}; "
            "differentiate one sample after another by flat_gradient"
        ) from error


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

"""Derivatives in parameters, per sample."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from divflow.errors import FieldError
from divflow.operators.operands import Parts, check_parameters, description, plain

__all__ = ["parameter_jacobian"]


def parameter_jacobian(
    f: nn.Module | Callable[..., Tensor],
    *inputs: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Compute per-sample derivatives with respect to parameters, without a loop over the batch.

        result[name][b] = d f(inputs[b]) / d parameters[name]

    Args:
        f: a module, or a function `f(parameters, *inputs)`; it is called with batches of one sample.
        *inputs: tensors of leading dimension k, or scalars that all samples share.
        parameters: for a function the tensors by name; for a module a selection by name (all if None).
        chunk_size: samples at a time; None takes all at once.

    Returns:
        A dict of `(k, *out, *parameter)` by name.

    Raises:
        FieldError: no parameters, unknown names, parameters that are not floating-point, no input with a batch, inputs of
            different batch sizes, or a function without one value per sample.

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
        raise FieldError("there are no parameters. Pass a module that has some, or `parameters`, a dict of tensors.")
    check_parameters(f, parameters, inputs)
    sizes = {len(tensor) for tensor in inputs if tensor.ndim}
    if len(sizes) != 1:
        raise FieldError(f"the inputs must share one batch size in dimension 0, but have {sorted(sizes)}")

    def one_value(value: Tensor, _: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape[:1] != (1,):
            raise FieldError(
                f"f must return one value per sample, (k, *out), but for one sample it returned {description(value)}"
            )
        return value[0]

    parts = Parts(one_value)

    def of_sample(p: dict[str, Tensor], *sample: Tensor) -> Tensor:
        # Copies, which f may write to.
        batches = [(s.unsqueeze(0) if tensor.ndim else s).clone() for s, tensor in zip(sample, inputs, strict=True)]
        return parts(function({name: value.clone() for name, value in p.items()}, *batches), batches[0])

    if sizes == {0}:  # an empty batch does not show the shapes of one sample
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
            f"torch can't take f's derivatives for all samples at once: {str(error).splitlines()[0]}. "
            "Differentiate one sample after another by flat_gradient."
        ) from error

"""Third derivatives of normalizations, which are wrong in torch (2.13; pytorch#175754, #186256), written out.

The kernels of layer and batch normalization keep the mean and the deviation that they computed. Their backward pass
takes into account how both depend on the input, and so does its derivative; but the derivative of that takes them for
constants. So if a second derivative is to be differentiated again, it goes through the backward pass written out by
simple operations, which is right to any order. The normalization's node in the graph is found under whatever name it
was called; values, first and second derivatives stay torch's own, and cost a look at the graph.
"""

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

__all__ = ["Normalizations"]


class Normalizations:
    """The normalizations on the way to a field's value, and in the products with its Jacobian.

    Args:
        output: the value.
        point: the state of which it is a function.
    """

    def __init__(self, output: Tensor, point: Tensor) -> None:
        self._known: set[Node] = set() if point.grad_fn is None else {point.grad_fn}
        self._orders: set[_Order] = set()
        self._look(output)

    def correct(self, product: Tensor, batched: bool) -> Tensor:
        """Return the product with a graph whose derivatives of every order are right.

        Args:
            product: with the Jacobian.
            batched: whether it is several, by batching rules, whose nodes can't be seen when they are made.
        """
        if _Order.HIDDEN in self._orders or (batched and self._orders):
            self._look(product)
        return product

    def _look(self, output: Tensor) -> None:
        nodes = [output.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._known:
                self._known.add(node)
                order = _order(type(node))
                if order is not None:
                    self._orders.add(order)
                    _hook(node, order)
                nodes.extend(function for function, _ in node.next_functions)


class _Order(Enum):
    """The role of a node for normalizations."""

    FIRST = "the backward pass of one"
    SECOND = "the derivative of that"
    HIDDEN = "differentiated by Python or TorchScript, about which nothing is known"


@functools.lru_cache(1024)
def _order(kind: type) -> _Order | None:
    name = kind.__name__
    if name in _WRITTEN_OUT:
        return _Order.SECOND
    if name in _FIRST:
        return _Order.FIRST
    hidden = name == "CppFunction" or issubclass(kind, torch.autograd.function.BackwardCFunction)
    return _Order.HIDDEN if hidden else None


def _hook(node: Any, order: _Order) -> None:
    """Hook each node once, however often it is met."""
    hook = {_Order.FIRST: _followed, _Order.SECOND: _written_out}.get(order)
    if hook is not None and not node.metadata.get(__name__):
        node.metadata[__name__] = True
        node.register_hook(hook)


def _followed(gradients: tuple[Any, ...], cotangents: tuple[Any, ...]) -> None:
    """A hook of a backward pass that hooks its derivative, too, if it is to be differentiated."""
    if torch.is_grad_enabled():
        for gradient in gradients:
            node = gradient.grad_fn if isinstance(gradient, Tensor) else None
            if node is not None and _order(type(node)) is _Order.SECOND:
                _hook(node, _Order.SECOND)


class _Backward(NamedTuple):
    """A normalization's backward pass, written out.

    Attributes:
        inputs: by their place among those of the node: the gradient of the value, the input, and the weight if there is one.
        outputs: the gradients of the input, of the weight and of the bias.
    """

    inputs: dict[int, Tensor]
    outputs: tuple[Tensor, ...]


def _written_out(gradients: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Replace torch's second derivatives by ones that have right derivatives.

    A hook of the node, run after it, that gets the node from torch: a hook that held it would keep the graph alive.
    """
    if not torch.is_grad_enabled():
        return None  # they are right, and not differentiated again
    node: Any = torch._C._current_autograd_node()
    written = _saved(_WRITTEN_OUT[type(node).__name__], node)
    given = zip(written.outputs, cotangents, strict=False)
    pairs = [(output.to(z.dtype), z) for output, z in given if z is not None and output.requires_grad]
    wanted = {place: z for place, z in written.inputs.items() if gradients[place] is not None and z.requires_grad}
    if not wanted or not pairs:
        return None
    outputs, weights = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, [*wanted.values()], weights, create_graph=True, allow_unused=True)
    right = {
        place: torch.zeros_like(gradients[place]) if z is None else z for place, z in zip(wanted, found, strict=True)
    }
    return tuple(right.get(place, gradient) for place, gradient in enumerate(gradients))


def _saved(write: Callable[[Any], _Backward], node: Any) -> _Backward:
    """Write out what was saved."""
    try:
        return write(node)
    except CheckpointError:
        pass
    # Under `torch.utils.checkpoint` it is available once per backward pass, and the node has used it: so in another pass.
    found: list[_Backward] = []

    def again(gradient: Tensor) -> None:
        with torch.enable_grad():
            found.append(write(node))

    start = torch.zeros((), device="cpu", requires_grad=True)
    end = start.clone()
    end.register_hook(again)
    torch.autograd.grad(end, start)
    return found[0]


def _layer_norm(node: Any) -> _Backward:
    g, x, weight = _aliases(node._saved_grad_out, node._saved_input, node._saved_weight)
    last = x.ndim - len(node._saved_normalized_shape)
    outputs = _gradients(g, x, weight, [*range(last, x.ndim)], [*range(last)], _found(node._saved_rstd))
    return _Backward(_present({0: g, 1: x, 4: weight}), outputs)


def _rms_norm(node: Any) -> _Backward:
    g, x, weight = _aliases(node._saved_grad_out, node._saved_input, node._saved_weight)
    last = x.ndim - len(node._saved_normalized_shape)
    rstd = _found(node._saved_rstd)
    outputs = _gradients(g, x, weight, [*range(last, x.ndim)], [*range(last)], rstd, centred=False)
    return _Backward(_present({0: g, 1: x, 3: weight}), outputs)


def _batch_norm(node: Any) -> _Backward:
    """Normalization by statistics of the batch; for constant ones torch's derivatives are right."""
    if not getattr(node, "_saved_train", getattr(node, "_saved_update", True)):
        return _Backward({}, ())
    # The kernels of cuDNN and MIOpen name these differently, and take the input first.
    others = type(node).__name__.startswith(("Cudnn", "Miopen"))
    g, eps = (node._saved_grad_output, node._saved_epsilon) if others else (node._saved_grad_out, node._saved_eps)
    g, x, weight = _aliases(g, node._saved_input, node._saved_weight)
    dims = [0, *range(2, x.ndim)]
    scale = None if weight is None else weight.view(-1, *[1] * (x.ndim - 2))
    outputs = _gradients(g, x, scale, dims, dims, lambda variance: (variance + eps).rsqrt())
    return _Backward(_present({0: x, 1: g, 2: weight} if others else {0: g, 1: x, 2: weight}), outputs)


_WRITTEN_OUT: dict[str, Callable[[Any], _Backward]] = {
    "NativeLayerNormBackwardBackward0": _layer_norm,
    "FusedRmsNormBackwardBackward0": _rms_norm,
    "NativeBatchNormBackwardBackward0": _batch_norm,
    "CudnnBatchNormBackwardBackward0": _batch_norm,
    "MiopenBatchNormBackwardBackward0": _batch_norm,
    "BatchNormBackwardBackward0": _batch_norm,
}
"""By the name of the node."""
_FIRST = {name.replace("BackwardBackward0", "Backward0") for name in _WRITTEN_OUT} | {
    "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
    "BatchNormWithUpdateBackward0",
}


def _aliases(*tensors: Tensor | None) -> list[Any]:
    """The tensors under other names, at which a derivative ends though they have a history."""
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def _present(inputs: dict[int, Tensor | None]) -> dict[int, Tensor]:
    return {place: tensor for place, tensor in inputs.items() if tensor is not None}


def _found(rstd: Tensor) -> Callable[[Tensor], Tensor]:
    """The reciprocal deviation that a kernel computed, as a function of the variance: its eps was not kept."""
    return lambda variance: (variance - variance.detach() + rstd.detach().to(variance).pow(-2)).rsqrt()


def _gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dims: list[int],
    samples: list[int],
    rstd: Callable[[Tensor], Tensor],
    centred: bool = True,
) -> tuple[Tensor, ...]:
    """The gradients of input, weight and bias of (x - mean) * rstd * weight + bias.

    Args:
        g: the gradient of the value.
        x: the input.
        weight: broadcast with it.
        dims: over which mean and variance are taken.
        samples: over which weight and bias are the same.
        rstd: the reciprocal deviation for a variance.
        centred: whether there is a mean.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # lower precision is normalized in a higher one
    g, x = g.to(dtype), x.to(dtype)
    x = x - x.mean(dims, keepdim=True) if centred else x
    scale = rstd(x.square().mean(dims, keepdim=True))
    value = x * scale
    weighted = g if weight is None else g * weight.to(dtype)
    along = value * (weighted * value).mean(dims, keepdim=True)
    mean = weighted.mean(dims, keepdim=True) if centred else 0.0
    of_input = scale * (weighted - mean - along)
    of_weight, of_bias = (z.sum(samples) if samples else z for z in (g * value, g))
    return of_input, of_weight, of_bias

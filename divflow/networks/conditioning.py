"""What every network does with its inputs besides x: time and context as columns of a matrix."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import DivflowError

__all__ = ["NetworkError", "condition", "zero_initialize"]


class NetworkError(DivflowError, ValueError):
    """A network was built or called with arguments that do not fit together."""


def condition(t: Tensor, x: Tensor, context: Tensor | None, context_features: int) -> Float[Tensor, "batch features"]:
    """Time, one column, and the context's columns, a row a sample, in x's dtype.

    Args:
        t: `()` or `(k,)`.
        x: `(k, *event)`.
        context: `(k, ...)`, flattened, or None.
        context_features: how many columns the network was built for.

    Raises:
        NetworkError: the context has another number of features.
    """
    columns = [t.to(x.dtype).reshape(-1, 1).expand(x.shape[0], 1)]
    if context is not None:
        columns.append(context.to(x.dtype).reshape(x.shape[0], math.prod(context.shape[1:])))
    features = columns[-1].shape[1] if context is not None else 0
    if features != context_features:
        raise NetworkError(
            f"the network was built for {context_features} context features, but got {features}; "
            "build it with context_features, and give every call its context"
        )
    return torch.cat(columns, dim=1)


def zero_initialize(layer: nn.Module) -> None:
    """Set a layer's weight and bias to zero, so that a flow starts as the identity."""
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)

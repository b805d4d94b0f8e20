"""Inputs of networks besides x: time and context as columns of a matrix."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import DivflowError

__all__ = ["NetworkError", "condition", "time_features", "zero_initialize"]


class NetworkError(DivflowError, ValueError):
    """A network was built or called with arguments that do not fit together."""


def time_features(time_embedding: nn.Module | None) -> int:
    """Number of columns of time: one by itself, or those of its embedding.

    Raises:
        NetworkError: the embedding has no integer attribute `features`.
    """
    features = 1 if time_embedding is None else getattr(time_embedding, "features", None)
    if not isinstance(features, int):
        raise NetworkError(
            f"a time embedding must have an integer attribute `features`, but {type(time_embedding).__name__} has none. "
            "Set it, or use SinusoidalEmbedding"
        )
    return features


def condition(
    t: Tensor, x: Tensor, context: Tensor | None, context_features: int, time_embedding: nn.Module | None = None
) -> Float[Tensor, "batch features"]:
    """Columns of time and of the context, one row a sample, in x's dtype.

    Args:
        t: `()` or `(k,)`.
        x: `(k, *event)`.
        context: `(k, ...)`, flattened, or None.
        context_features: number of columns that the network was built for.
        time_embedding: from times `(n,)` to features `(n, time_features(time_embedding))`; None for time itself.

    Raises:
        NetworkError: the context has another number of features.
    """
    if time_embedding is None:
        times = t.to(x.device, x.dtype).reshape(-1, 1)
    else:
        # One row for a scalar t. Fast waves turn the rounding of times in half precision into noise.
        precise = t.to(x.device, torch.promote_types(x.dtype, torch.float32))
        times = time_embedding(precise.reshape(-1)).to(x.dtype)
    columns = [times.expand(x.shape[0], -1)]
    if context is not None:
        columns.append(context.to(x.dtype).reshape(x.shape[0], math.prod(context.shape[1:])))
    features = columns[-1].shape[1] if context is not None else 0
    if features != context_features:
        raise NetworkError(
            f"the network was built for {context_features} context features, but got {features}. "
            f"Pass a context of {context_features} in every call, or build it with context_features={features}"
        )
    return torch.cat(columns, dim=1)


def zero_initialize(layer: nn.Module) -> None:
    """Set a layer's weight and bias to zero, so that a flow starts as the identity."""
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)

"""An autograd graph, walked and used."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

from divflow.errors import FieldError

__all__ = ["graph_of", "reentrant_refused"]


def graph_of(*outputs: Tensor, start: Tensor | None = None) -> Iterator[Node]:
    """The nodes of the autograd graph that leads to some tensors, as far back as one that it starts from."""
    nodes, seen = [output.grad_fn for output in outputs], set()
    end = None if start is None else start.grad_fn
    while nodes:
        node = nodes.pop()
        if node is not None and node is not end and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(function for function, _ in node.next_functions)


@contextlib.contextmanager
def reentrant_refused() -> Iterator[None]:
    """Around products with a field's Jacobian.

    Raises:
        FieldError: in place of torch's error, which is of another use.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise FieldError(
            "the field is checkpointed by torch.utils.checkpoint with use_reentrant=True, through which no products with a "
            "Jacobian go; use use_reentrant=False (gradient_checkpointing_kwargs of transformers)"
        ) from error

"""An autograd graph, walked and used."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

from divflow.errors import FieldError

__all__ = ["graph_of", "reentrant_refused"]


def graph_of(*outputs: Tensor) -> Iterator[Node]:
    """The nodes of the autograd graph that leads to some tensors."""
    nodes, seen = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
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

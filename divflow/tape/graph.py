"""An autograd graph, walked."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["graph_of"]


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

"""Several products with a Jacobian in one pass, compared with single ones before they are used.

Some of torch's batching rules are wrong (`group_norm` with a graph, torch 2.13, returns other numbers). So a batched
product is tested on random vectors when a structure of the graph is first seen, and again at uses 2, 4, 8, ...
"""

import functools
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node

from divflow.tape.cache import Cache

__all__ = ["batches"]

Product = Callable[[Tensor, bool], Tensor]


class _Verdict:
    """Whether batched products were right for a structure, and how often they were used."""

    def __init__(self, right: bool) -> None:
        self.right, self.uses = right, 1


_VERDICTS: Cache[_Verdict] = Cache(4096)


def batches(product: Product, output: Tensor, point: Tensor, count: int, create_graph: bool) -> bool:
    """Whether `count` products may be taken in one pass.

    They may if they equal single products and, with a graph, if their derivatives do, too. The derivatives see what a last
    layer of zeros hides from the products themselves.

    Args:
        product: `product(vectors, batched)`, of one vector or several.
        output: whose graph they go through.
        point: where it starts.
        count: vectors per pass.
        create_graph: whether the products keep a graph.
    """
    nodes = list(_between(output, point))
    key = count, create_graph, output.dtype, output.device, tuple(map(_options, nodes))
    verdict = _VERDICTS.get(key)
    if verdict is not None:
        verdict.uses += 1
        if verdict.uses & (verdict.uses - 1):
            return verdict.right
    leaves = [variable for node in nodes if (variable := getattr(node, "variable", None)) is not None]
    right, telling = _compare(product, output, [point, *leaves], count, create_graph)
    if verdict is not None:
        verdict.right = right
    elif telling:
        _VERDICTS.keep(key, _Verdict(right))
    return right


def _compare(
    product: Product, output: Tensor, inputs: list[Tensor], count: int, create_graph: bool
) -> tuple[bool, bool]:
    """Whether the first and the last of `count` products equal single ones, and whether that proves anything."""
    noise = torch.Generator().manual_seed(0)
    vectors = torch.randn((count, *output.shape), generator=noise, dtype=torch.float64, device="cpu").to(output)
    weights = torch.randn((2, *inputs[0].shape), generator=noise, dtype=torch.float64, device="cpu").to(output)
    single = torch.stack([product(vectors[0], False), product(vectors[-1], False)])
    try:
        batched = product(vectors, True)[[0, -1]]
        derivatives = _derivatives(batched, weights, inputs) if create_graph else []
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an operation without a batching rule, or a hook of the field that refuses such a gradient
        return False, True
    try:
        expected = _derivatives(single, weights, inputs) if create_graph else []
    except Exception:  # nothing to compare: the field has no second derivatives
        expected = derivatives
    pairs = list(zip([batched, *derivatives], [single, *expected], strict=True))
    telling = all(true.isfinite().all() for _, true in pairs) and any(true.any() for _, true in pairs)
    return all(_close(actual, true) for actual, true in pairs), telling


def _derivatives(products: Tensor, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if not products.requires_grad:
        return []
    with torch.inference_mode(False), torch.enable_grad():
        loss = (products * weights).sum()
        return list(torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True))


def _close(actual: Tensor, true: Tensor) -> bool:
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(true.dtype, 0.05)
    scale = true.detach().nan_to_num(0, 0, 0).abs().amax().item() if true.numel() else 0.0
    return torch.allclose(actual.detach(), true.detach(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _between(output: Tensor, point: Tensor) -> Iterator[Node]:
    """The nodes of the graph from an output to a point, always in the same order."""
    nodes, seen, end = [output.grad_fn], set(), point.grad_fn
    while nodes:
        node = nodes.pop()
        if node is not None and node is not end and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(function for function, _ in node.next_functions)


def _options(node: Node) -> Hashable:
    """What a node computes: its name, shapes, and options such as a number of groups."""
    values = tuple(getattr(node, name) for name in _names_of_options(type(node)))
    plain = tuple(value for value in values if isinstance(value, (int, str, tuple, type(None))))
    shapes = tuple(tuple(entry.shape) for entry in getattr(node, "_input_metadata", ()))
    return node.name(), shapes, len(node.next_functions), plain


@functools.cache
def _names_of_options(kind: type) -> tuple[str, ...]:
    names = dir(kind)
    # What is also there raw is a tensor, which may have been freed.
    raw = {name.removeprefix("_raw") for name in names if name.startswith("_raw_saved_")}
    return tuple(name for name in names if name.startswith("_saved_") and name not in raw)

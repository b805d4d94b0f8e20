"""Exact divergence of local fields, such as convolutions, by colouring: one product for many dimensions.

Where output i depends on few inputs, colour the entries of the event so that no two of one colour see each other.
With e_c the indicator of colour c, `sum(e_c * (e_c^T J))` is then exactly that colour's part of the trace. The number
of colours, about C (r + 1)^2 for C channels and receptive radius r in two dimensions, does not grow with the image.
(Curtis, Powell & Reid 1974, for Jacobians; for the trace alone two entries may share what they see.)
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from divflow.operators.dense import sum_of_chunks
from divflow.operators.field import Field, accumulation_dtype, event_size, flatten_event
from divflow.operators.linearization import Linearization
from divflow.verification.read_only import NoWrites, WritesError

__all__ = ["Coloring", "NotLocal", "check", "find", "trace"]

# Entries, and pairs of them that see each other: beyond, finding the colours takes longer than they save.
_MOST_ENTRIES, _MOST_PAIRS = 2**13, 2**21


class NotLocal(Exception):  # noqa: N818 - caught inside this package, and no error
    """A field that colouring does not serve; the message says why."""


class Coloring(NamedTuple):
    """A colouring of an event's entries.

    Attributes:
        seen: `(D, D)`, whether output i depends on input j.
        colors: indicators of the colours, `(colors, D)`.
        statistics: of normalizations, a sample, with which held this is so.
    """

    seen: Tensor
    colors: Tensor
    statistics: int = 0


def find(g: Field, t: Tensor, x: Tensor, field: Linearization) -> Coloring:
    """Find which entries see each other, and colour them.

    The structure is found with NaNs, which pass through any weight, including zero, and is then tested on random vectors.
    Fields that choose by masks, indices or values what they see are excluded, because they may see something else at
    another point; so are fields that keep a state in tensors, such as running statistics, where a NaN would stay.

    Args:
        g: the field, evaluated about D / k times.
        t: time.
        x: states `(k, *event)`.
        field: evaluated at (t, x), for products.

    Raises:
        NotLocal: the first entry is seen from more than half of the event, or the check failed.
    """
    size = event_size(x)
    if size > _MOST_ENTRIES:
        raise NotLocal(f"more than {_MOST_ENTRIES} dimensions take long to colour")
    seen = torch.zeros(size, size, dtype=torch.bool, device="cpu")
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), _plain_convolutions(x):
        for start in range(0, size, len(x)):
            entries = [*range(start, min(start + len(x), size))]
            spoilt = flatten_event(x.detach().clone())
            spoilt[range(len(entries)), entries] = torch.nan
            try:
                with torch.inference_mode(False), torch.enable_grad(), NoWrites([spoilt]):
                    values = flatten_event(g(t, spoilt.view_as(x)).detach())[: len(entries)]
            except torch.OutOfMemoryError:
                raise
            except WritesError as error:
                raise NotLocal(f"the field keeps a state: {error}") from error
            except Exception as error:  # whatever a field does with a NaN, at x itself it has been evaluated
                raise NotLocal(f"the field refuses a NaN ({type(error).__name__})") from error
            seen[:, entries] |= values.isnan().T.cpu()
            # It lies in a corner, where a local field's entries are seen from about as many as there are colours.
            if start == 0 and seen[:, 0].sum() > size / 2:
                raise NotLocal("the first entry of the event is seen from more than half of it")
        check(field, x, seen)
    pairs = torch.triu(seen | seen.T, diagonal=1).nonzero()
    if len(pairs) > _MOST_PAIRS:
        raise NotLocal(f"more than {_MOST_PAIRS} pairs of entries see each other")
    with torch.inference_mode(False):  # kept, for calls that may train
        colors = torch.tensor(_greedy_colors(size, pairs), device="cpu")
        return Coloring(seen, (colors == torch.arange(int(colors.max()) + 1, device="cpu")[:, None]).to(x.device))


def _greedy_colors(size: int, pairs: Tensor) -> list[int]:
    """A colour for each entry, the fewest of several greedy orders."""
    import networkx as nx  # here, since most who import divflow.divergence never colour anything

    graph = nx.Graph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from(pairs.tolist())
    # In the order of the entries, row by row, the periodic colouring of a grid is found.
    orders = (lambda graph, colors: list(graph)), "largest_first", "smallest_last"
    best = min((nx.greedy_color(graph, order) for order in orders), key=lambda colors: max(colors.values()))
    return [best[i] for i in range(size)]


def trace(field: Linearization, x: Tensor, colors: Tensor, chunk_size: int, recompute: bool) -> Tensor:
    """The divergence from one product a colour, `(k,)`."""

    def vectors(start: int, stop: int) -> Tensor:
        return colors[start:stop].to(x).view(stop - start, 1, *x.shape[1:]).expand(stop - start, *x.shape)

    def part(products: Tensor, start: int, stop: int) -> Tensor:
        return flatten_event(products * vectors(start, stop), 2).sum(dim=(0, 2), dtype=accumulation_dtype(x))

    return sum_of_chunks(field, vectors, part, x, len(colors), chunk_size, recompute)


def check(field: Linearization, x: Tensor, seen: Tensor) -> None:
    """Products with random vectors on a few outputs must vanish at all inputs that these do not see.

    Raises:
        NotLocal: they don't.
    """
    size, generator = event_size(x), torch.Generator().manual_seed(0)
    few = max(1, size // (4 * max(1, int(seen.sum(dim=1).max()))))
    for _ in range(8):
        outputs = torch.randperm(size, generator=generator, device="cpu")[:few]
        vector = torch.zeros(size, device="cpu")
        vector[outputs] = torch.randn(few, generator=generator, device="cpu")
        vectors = vector.to(x).view(1, 1, *x.shape[1:]).expand(1, *x.shape)
        product = flatten_event(field.pullback(vectors)[0]).cpu()
        if (product[:, ~seen[outputs].any(dim=0)] != 0).any():
            raise NotLocal("what sees what differs from sample to sample")


class _plain_convolutions:  # noqa: N801 - used as a function
    """Without cuDNN, whose algorithms spread a NaN beyond what a convolution sees."""

    def __init__(self, x: Tensor) -> None:
        self._flags = torch.backends.cudnn.flags(enabled=False) if x.is_cuda else None

    def __enter__(self) -> None:
        if self._flags is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._flags.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._flags is not None:
            self._flags.__exit__(*error)

"""Local fields with normalizations, such as convolutions with GroupNorm: a local Jacobian plus one of low rank.

Through a normalization every entry of x reaches every other, but only by a few numbers per sample: its statistics s, which
are the means and reciprocal deviations of its groups. With s held fixed, g(x, s) is local. Let

    A = dg/ds,    B = ds/dx,    S = ds/ds

where each statistic depends on x and on those of earlier layers, so that S is strictly lower triangular. Then

    J = dg/dx + A C,    C = (I - S)^-1 B,    tr J = tr dg/dx + sum_m c_m^T A e_m

with the rows c_m of C. The local part takes one product for each colour, the other part two for each statistic.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from divflow.divergence.exact.colored import colors as coloring
from divflow.divergence.exact.colored.colors import NotLocal
from divflow.divergence.exact.colored.statistics import Put, Take, require_value
from divflow.operators.dense import chunks, sum_of_chunks, trace_of_chunk
from divflow.operators.field import Field, event_size, flatten_event
from divflow.operators.linearization import Linearization, linearize_field
from divflow.tape import NoRule
from divflow.tape.randomness import rng_states, set_rng_states
from divflow.verification.agreement import require_equal
from divflow.verification.read_only import NoWrites, WritesError

__all__ = ["Held", "check", "hold", "trace"]


class Held(NamedTuple):
    """The field at x as a function g(x, s) of x and of the statistics s of its normalizations.

    Attributes:
        field: g with s held at the statistics of x, wherever it is evaluated.
        local: its value, and products with dg/dx.
        outer: products with A = dg/ds.
        inner: products with the rows of [B S], one item for each tensor of statistics.
        total: number of statistics per sample.
        normalizations: number of normalizations that they belong to.
    """

    field: Field
    local: Linearization
    outer: Linearization
    inner: list[Linearization]
    total: int
    normalizations: int


def hold(g: Field, t: Tensor, x: Tensor, states: list[Tensor], verify: bool) -> Held:
    """Evaluate a field twice: for its statistics, and with these held.

    Args:
        g: the field.
        t: time, `()` or `(k,)`.
        x: states `(k, *event)`.
        states: states of the random generators before the field was first evaluated, so that it draws the same numbers.
        verify: compare normalizations that are computed by parts with torch's own, and refuse a field that changes its state.

    Raises:
        NotLocal: no statistics depend on x, or too many, or the field can't be evaluated by parts.
    """
    after = rng_states(x)
    try:
        with _refusing(), NoWrites([]) if verify else contextlib.nullcontext():
            return _evaluated(g, t, x, states, verify)
    finally:
        set_rng_states(after)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn any error of an evaluation by parts into NotLocal: the field itself may be fine, and other methods take it."""
    try:
        yield
    except (torch.OutOfMemoryError, NotLocal):
        raise
    except WritesError as error:
        raise NotLocal(f"the field keeps a state: {error}") from error
    except NoRule as error:
        raise NotLocal(str(error)) from error
    except Exception as error:
        raise NotLocal(f"it can't be evaluated with its statistics held ({type(error).__name__})") from error


def _evaluated(g: Field, t: Tensor, x: Tensor, states: list[Tensor], verify: bool) -> Held:
    set_rng_states(states)
    take = Take(x, verify)
    first = linearize_field(lambda t, z: take.value(g, t, z), t, x, watched=False)
    if not take.statistics:
        many = f"{take.refused} statistics of normalizations for {event_size(x)} dimensions are too many to hold"
        raise NotLocal(many if take.refused else "it has no statistics to hold")
    statistics = torch.cat([flatten_event(s) for s in take.statistics], dim=1)
    set_rng_states(states)
    return _held(g, t, x, statistics if first.create_graph else statistics.detach(), take)


def _held(g: Field, t: Tensor, x: Tensor, statistics: Tensor, take: Take) -> Held:
    size, found = event_size(x), list[Any]()

    def extended(t: Tensor, z: Tensor) -> Tensor:
        """(x, s) -> (g, s): the statistics are replaced by those in z, and computed anew from x and the replaced earlier ones."""
        state, held = z[:, :size].reshape(x.shape), z[:, size:].clone()
        put = Put(held, take)
        with put.listening:
            value = g(t, state.clone())
        put.require_all()
        again = [flatten_event(statistic) for statistic in put.statistics]
        found[:] = value, z, state, held, again
        return torch.cat([flatten_event(value), *again], dim=1)

    def field(t: Tensor, z: Tensor) -> Tensor:
        at = torch.cat([flatten_event(z), statistics.detach()], dim=1)
        return linearize_field(extended, t, at, watched=False).value[:, :size].reshape(x.shape)

    graph = linearize_field(extended, t, torch.cat([flatten_event(x), statistics], dim=1), watched=False).create_graph
    value, z, state, held, again = found
    inner = [Linearization(statistic, z, graph) for statistic in again]
    local, outer = Linearization(value, state, graph), Linearization(value, held, graph)
    return Held(field, local, outer, inner, statistics.shape[1], len(take.owners))


def trace(held: Held, x: Tensor, colors: Tensor, chunk_size: int, recompute: bool) -> Tensor:
    """The divergence `(k,)`, by one product for each colour and two for each statistic."""
    rows = _rows(held, x, chunk_size, recompute)

    def vectors(start: int, stop: int) -> Tensor:
        return rows[start:stop].view(stop - start, *x.shape)

    low_rank = sum_of_chunks(held.outer, vectors, trace_of_chunk, x, held.total, chunk_size, recompute)
    return coloring.trace(held.local, x, colors, chunk_size, recompute) + low_rank


def _rows(held: Held, x: Tensor, chunk_size: int, recompute: bool) -> Tensor:
    """C = (I - S)^-1 B, `(n, k, D)`."""
    found: list[Tensor] = []
    for field in held.inner:
        count = event_size(field.value)

        def vectors(start: int, stop: int, count: int = count) -> Tensor:
            return torch.eye(count, dtype=x.dtype, device=x.device)[start:stop, None].expand(-1, len(x), -1)

        found += chunks(field, vectors, lambda products, *_: products, count, chunk_size, recompute)
    b, s = torch.cat(found).transpose(0, 1).split([event_size(x), held.total], dim=2)
    unit = torch.eye(held.total, dtype=x.dtype, device=x.device)
    return torch.linalg.solve_triangular(unit - s, b, upper=False, unitriangular=True).transpose(0, 1)


def check(held: Held, field: Linearization, x: Tensor) -> None:
    """Compare the value and one product u^T J with those of the field itself.

    Args:
        held: the field with its statistics held.
        field: the field itself, by autograd.
        x: states `(k, *event)`.

    Raises:
        NotLocal: they disagree.
    """
    noise = torch.Generator().manual_seed(0)
    u, v = (torch.randn(x.shape, generator=noise, dtype=torch.float64, device="cpu").to(x) for _ in range(2))
    with torch.no_grad(), _refusing():
        local, outer, true = (flatten_event(f.pullback(u[None], True)[0]) for f in (held.local, held.outer, field))
        rest = torch.einsum("kn,nkd->kd", outer, _rows(held, x, held.total, False).detach())
        weights = flatten_event(v)
        bound = (local.abs() + rest.abs()) * weights.abs()
        require_value(held.local.value, field.value, "with its statistics held it has another value")
        require_equal((local + rest) * weights, true * weights, x.dtype, "its statistics are not all", bound)

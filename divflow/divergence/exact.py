"""The exact divergence: which method, and why."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.divergence import colored, dense
from divflow.divergence.dense import rng_states, set_rng_states
from divflow.divergence.estimator import Estimate, Estimator
from divflow.divergence.field import Field, FieldError, as_time, checked_state, event_size, linearize_field
from divflow.divergence.layered import Followed, NoRule, contract, follow
from divflow.divergence.plan import Plan, Plans, circumstances, state_of

__all__ = ["Exact"]

_METHODS = ("auto", "layered", "colored", "forward", "reverse")
# Bytes that the layered method may take beside the value.
_LARGEST_MEMORY = 2**31
# Relative cost at which a batch for each time, with its smaller matrix products, is worth it.
_WORTH_SEPARATING = 0.5


class _Kept(NamedTuple):
    """A plan, the structure of the field that it was made for, and the colours if there are any."""

    plan: Plan
    signature: Hashable
    colors: Tensor | None = None


# Plans by field and shape of x; colourings by field, event shape and structure, whatever the batch.
_PLANS, _COLORINGS = Plans(), Plans(size=8)


@dataclass(frozen=True)
class Exact(Estimator):
    """The exact divergence of any field.

        (div g)_b = sum_i e_i^T J_b e_i

    Args:
        method: "layered" has a closed form for networks of linear maps and elementwise functions, at the
            price of about one probe whatever D is (see `divflow.divergence.layered`); "colored" takes one
            product for many dimensions of a local field, such as a convolutional network (see
            `divflow.divergence.colored`); "reverse" takes rows of the Jacobian from one evaluation of the
            field; "forward" takes columns (`torch.func.jvp`), for fields with forward-mode rules, evaluating
            once a pass. "auto" takes the cheapest that applies (`explain` says which and why): the choice is
            made at the first call for a field and shape of x, which takes longer than the following ones.
        chunk_size: basis vectors a pass; None takes what suits the device. Peak memory grows with it and
            not with D; where it is given, that holds in training too: each chunk is then computed again
            in the backward pass, at about a third more time.

    All methods are differentiable in x, t and parameters, to any order that the field supports.

    Raises:
        ValueError: an unknown method, or a chunk size below 1.
        FieldError: by a call, where `method="layered"` or `"colored"` does not apply; the message says why.
    """

    method: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method must be one of {list(_METHODS)}, but is {self.method!r}")
        if self.chunk_size is not None and (self.chunk_size < 1 or int(self.chunk_size) != self.chunk_size):
            raise ValueError(f"chunk_size must be None or a whole number of at least 1, but is {self.chunk_size!r}")

    def explain(self, g: Field, t: Tensor | float, x: Tensor) -> Plan:
        """What a call with these arguments does, why, and what it is expected to cost.

        The field is evaluated, unless the choice for it has been made before.
        """
        x = checked_state(x)
        kept = self._kept(g, as_time(t, x), x)
        if kept is None:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                kept, _ = self._first(g, as_time(t, x), x)
        return kept.plan

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the exact divergence and a standard error of zero; `generator` is not used."""
        x = checked_state(x)
        t = as_time(t, x)
        if self.method == "forward":
            value, divergence = dense.forward(g, t, x, self._chunk_size(x, event_size(x)))
            return _exactly(value, divergence)
        kept = self._kept(g, t, x)
        if kept is not None and kept.plan.method not in ("layered", "colored"):
            return self._result(kept, Followed(linearize_field(g, t, x), None, None), x)
        followed = None
        if kept is not None:
            followed = self._followed_as_before(g, t, x, kept)
        if followed is None:
            kept, followed = self._first(g, t, x)
        return self._result(kept, followed, x)

    def _followed_as_before(self, g: Field, t: Tensor, x: Tensor, kept: _Kept) -> Followed | None:
        """The field evaluated, if it did the same as when its plan was made; else the random numbers are given back."""
        states = rng_states(x)
        products = torch.is_grad_enabled() or kept.plan.method == "colored"
        try:
            followed = follow(g, t, x, products)
            if followed.signature == kept.signature and not followed.hides():
                return followed
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Without products x needs no gradient, which a field may ask of it: `_first` evaluates it as autograd
            # would, and raises what is wrong with the field itself.
            if products:
                raise
        set_rng_states(states)
        return None

    def prefers_one_time(self, g: Field, t: Tensor, x: Tensor) -> bool:
        """True where gates that depend on a scalar t alone can be folded into the matrices of a layered network."""
        shared = self.explain(g, t, x)
        if shared.method != "layered":
            return False
        return (
            shared.cost_in_forward_passes
            < _WORTH_SEPARATING * self.explain(g, t.expand(len(x)), x).cost_in_forward_passes
        )

    def _kept(self, g: Field, t: Tensor, x: Tensor) -> _Kept | None:
        if self.method in ("forward", "reverse") or x.numel() == 0 or torch.compiler.is_compiling():
            return _Kept(self._dense(x, "asked for" if self.method != "auto" else "there is nothing to gain"), None)
        return _PLANS.get(g, self, *circumstances(t, x))

    def _first(self, g: Field, t: Tensor, x: Tensor) -> tuple[_Kept, Followed]:
        """Evaluate once, choose, and keep the choice."""
        before = state_of(g)
        followed = follow(g, t, x, products=True)
        kept = self._choose(g, t, x, followed, changes_itself=state_of(g) != before)
        _PLANS.keep(kept, g, self, *circumstances(t, x))
        return kept, followed

    def _choose(self, g: Field, t: Tensor, x: Tensor, followed: Followed, changes_itself: bool) -> _Kept:
        reasons = []
        if self.method in ("auto", "layered"):
            try:
                return _Kept(self._layered(x, followed), followed.signature)
            except NoRule as error:
                reasons.append(f"not layered: {error}".rstrip(","))
        if self.method in ("auto", "colored"):
            try:
                if changes_itself:
                    raise colored.NotLocal("the field changes its own state when it is evaluated")
                colors = _colors(g, t, x, followed)
                return _Kept(self._colored(x, colors, followed), followed.signature, colors)
            except colored.NotLocal as error:
                reasons.append(f"not colored: {error}")
        if self.method != "auto":
            raise FieldError(
                f"method={self.method!r} does not apply to this field ({'; '.join(reasons)}); use "
                "method='auto', which takes the cheapest that does"
            )
        return _Kept(self._dense(x, f"dense products: {'; '.join(reasons)}", followed), None)

    def _layered(self, x: Tensor, followed: Followed) -> Plan:
        cycles = followed.cycles()
        followed.verify(cycles)
        value, batch = max(1, followed.trace.multiplications), x.shape[0]
        products = sum(contract.cost(cycle, batch) for cycle in cycles)
        memory = sum(contract.memory(cycle, batch) for cycle in cycles) * x.element_size()
        if self.method == "auto" and products > value * event_size(x):
            raise NoRule(f"its {len(cycles)} paths take more multiplications than dense products")
        if self.method == "auto" and memory > _LARGEST_MEMORY:
            raise NoRule(f"its matrices take {memory / 2**30:.1f} GiB")
        paths = "one path" if len(cycles) == 1 else f"{len(cycles)} paths"
        why = f"{paths} of linear maps and elementwise functions, multiplied out for the whole batch"
        cost = 1 + products / value
        return Plan("layered", why, 0, 1, cost, cost / 2, memory)

    def _colored(self, x: Tensor, colors: Tensor, followed: Followed) -> Plan:
        count, size = len(colors), event_size(x)
        if self.method == "auto" and count > 0.8 * size:
            raise colored.NotLocal(f"it takes {count} colours for {size} dimensions")
        # A network of images has far more activations than its states have entries.
        chunk = self._chunk_size(x, count, max(1, followed.trace.elements // x.numel()))
        why = f"a local field: {count} colours for {size} dimensions"
        return Plan("colored", why, count, chunk, 1 + count, (1 + count) / 2, self._memory(x, chunk, followed))

    def _dense(self, x: Tensor, why: str, followed: Followed | None = None) -> Plan:
        size = event_size(x)
        chunk = self._chunk_size(x, size)
        method = "forward" if self.method == "forward" else "reverse"
        return Plan(method, why, size, chunk, 1 + size, (1 + size) / 2, self._memory(x, chunk, followed))

    def _memory(self, x: Tensor, chunk: int, followed: Followed | None) -> int:
        """Each product of a pass holds about what the value's evaluation does."""
        elements = x.numel() if followed is None else followed.trace.elements
        return chunk * elements * x.element_size()

    def _chunk_size(self, x: Tensor, count: int, activations: int = 1) -> int:
        return min(self.chunk_size or dense.products_per_pass(x, activations), max(count, 1))

    def _result(self, kept: _Kept, followed: Followed, x: Tensor) -> Estimate:
        field, method, recompute = followed.field, kept.plan.method, self.chunk_size is not None
        if method == "layered":
            divergence = followed.divergence(followed.cycles(), self.chunk_size)
        elif method == "colored":
            divergence = colored.trace(field, x, kept.colors, kept.plan.chunk_size, recompute)
        else:
            divergence = dense.reverse(field, x, kept.plan.chunk_size, recompute)
        return _exactly(field.value, divergence)


def _colors(g: Field, t: Tensor, x: Tensor, followed: Followed) -> Tensor:
    if followed.hides() or not followed.trace.depends(followed.output):
        raise colored.NotLocal("a part of it is hidden from torch functions")
    if followed.trace.choices:
        raise colored.NotLocal(f"{followed.trace.choices[0]} may choose what is seen")
    key = x.shape[1:], x.dtype, x.device, followed.structure
    coloring = _COLORINGS.get(g, *key)
    if coloring is not None:
        try:
            colored.check(followed.field, x, coloring.seen)
            return coloring.colors
        except colored.NotLocal:
            pass  # it was another field: find its own
    coloring = colored.find(g, t, x, followed.field)
    _COLORINGS.keep(coloring, g, *key)
    return coloring.colors


def _exactly(value: Tensor, divergence: Tensor) -> Estimate:
    return Estimate(value, divergence, torch.zeros_like(divergence, requires_grad=False))

"""The exact divergence: which method, and why."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.arguments import check_count
from divflow.divergence import dense, forward_mode, local, own
from divflow.divergence.colored import Coloring
from divflow.divergence.compiled import eagerly
from divflow.divergence.estimator import Estimate, Estimator
from divflow.divergence.field import (
    AtTime,
    Field,
    FieldError,
    Linearization,
    as_time,
    checked_state,
    event_size,
    linearize_field,
)
from divflow.divergence.layered import Contraction, Followed, NoRule, follow
from divflow.divergence.local import Local, NotLocal
from divflow.divergence.plan import Plan, circumstances
from divflow.divergence.transformed import transformed
from divflow.verification.kept import Plans
from divflow.verification.schedule import record_of
from divflow.verification.seeded import rng_states, set_rng_states
from divflow.verification.state import state_of
from divflow.verification.watch import watch

__all__ = ["Exact"]

_METHODS = ("auto", "own", "layered", "colored", "forward", "reverse")
# Bytes that the layered method may take beside the value.
_LARGEST_MEMORY = 2**31
# Relative cost at which a batch for each time, with its smaller matrix products, is worth it.
_WORTH_SEPARATING = 0.5
# How much lighter a value between weighs, in how many products a pass holds, than an entry of x (measured on
# MLPs, where weighing it fully costs a third of the time, and UNets, where not at all doubles it).
_LIGHTER = 8
# Products, for each dimension, up to which colours are worth it.
_WORTH_COLORING = 0.8
# Structures of one field that plans are made for, before it is taken for one that never does the same twice.
_MOST_STRUCTURES = 8


class _Choice(NamedTuple):
    """A plan, and the colouring if there is one."""

    plan: Plan
    coloring: Coloring | None = None


class _Choices:
    """The choices for one field: by what it did when they were made, or one under None, whatever it does.

    Attributes:
        latest: the plan that was made last.
        stateful: whether the field was seen to change itself, so that it must be evaluated once a call.
    """

    def __init__(self) -> None:
        self._by_signature: dict[Hashable, _Choice] = {}
        self._calls, self._surprised = 0, False
        self.latest: Plan | None = None
        self.stateful = False

    def get(self, signature: Hashable) -> _Choice | None:
        """The choice for a structure."""
        return self._by_signature.get(signature)

    def add(self, signature: Hashable, choice: _Choice) -> None:
        """Remember the choice for a structure, in place of an earlier one."""
        self._by_signature[signature] = choice
        self.latest = choice.plan

    def __len__(self) -> int:
        return len(self._by_signature)

    def products(self) -> bool:
        """Whether products with the Jacobian may be needed, beside those of a verification."""
        return self.stateful or any(choice.coloring is not None for choice in self._by_signature.values())

    def due(self) -> bool:
        """Count a call: at calls 1, 2, 4, 8, ..., and after one that did something else, it is verified."""
        self._calls += 1
        due = self._surprised or self._calls & (self._calls - 1) == 0
        self._surprised = False
        return due

    def surprise(self) -> None:
        """Note that the field did what there is no choice for."""
        self._surprised = True


class _Made(NamedTuple):
    """A choice, the evaluation that it was made or found for, and what a layered or a coloured one is taken by."""

    choice: _Choice
    followed: Followed
    contraction: Contraction | None = None
    local: Local | None = None


# Choices by field and circumstances.
_CHOICES: Plans[_Choices] = Plans()


@dataclass(frozen=True)
class Exact(Estimator):
    """The exact divergence of any field.

        (div g)_b = sum_i e_i^T J_b e_i

    Args:
        method: "own" takes what the field says of itself, by a method `value_and_divergence(t, x)` that
            returns `(k, *event)` and `(k,)`, and compares it with autograd (see `divflow.divergence.own`);
            "layered" has a closed form for networks of linear maps and elementwise functions, at the
            price of about one probe whatever D is (see `divflow.divergence.layered`); "colored" takes one
            product for many dimensions of a local field, such as a convolutional network (see
            `divflow.divergence.colored`), and two for each statistic of the normalizations in it, such as GroupNorm,
            evaluating it three times (see `divflow.divergence.normalized`); "reverse" takes rows of the Jacobian from one evaluation of the
            field; "forward" takes columns (`torch.func.jvp`), for fields with forward-mode rules, evaluating
            once a pass; torch's rules for it are compared with products in reverse (see `divflow.divergence.forward_mode`). "auto" takes the cheapest that applies (`explain` says which and why): the choice is
            made at the first call for a field and shape of x, which takes longer than the following ones.
        chunk_size: basis vectors a pass; None takes what suits the device. Peak memory grows with it and
            not with D; where it is given, that holds in training too: each chunk is then computed again
            in the backward pass, at about a third more time.

    All methods are differentiable in x, t and parameters, to any order that the field supports.

    Raises:
        ValueError: an unknown method, or a chunk size below 1.
        FieldError: by a call, where `method="own"`, `"layered"` or `"colored"` does not apply, or the field's own
            divergence is wrong; the message says why.
    """

    method: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method must be one of {list(_METHODS)}, but is {self.method!r}")
        if self.chunk_size is not None:
            check_count("chunk_size, unless it is None,", self.chunk_size)

    @eagerly
    def explain(self, g: Field, t: Tensor | float, x: Tensor) -> Plan:
        """What a call with these arguments does, why, and what it is expected to cost.

        The field is evaluated, unless the choice for it has been made before. The reason says, too, where a field that is
        suspect could not be compared with differences, as one that keeps a state (`divflow.verification`).
        """
        x = checked_state(x)
        t = as_time(t, x)
        plan, note = self._explained(g, t, x), record_of(AtTime(g, t), x).note
        return plan._replace(why=f"{plan.why}; {note}") if note else plan

    def _explained(self, g: Field, t: Tensor, x: Tensor) -> Plan:
        if own.applies(self.method, g, x):
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                return own.plan(g, t, x)
        choices = self._choices(g, t, x)
        if choices.latest is None:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                return self._made(g, t, x, choices).choice.plan
        return choices.latest

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """The value, the exact divergence and a standard error of zero; `generator` is not used."""
        x = checked_state(x)
        t = as_time(t, x)
        if own.applies(self.method, g, x):
            return _exactly(*own.evaluate(g, t, x))
        if self.method == "forward":
            return _exactly(*forward_mode.evaluate(g, t, x, self._chunk_size(x, event_size(x))))
        choices = self._choices(g, t, x)
        always = choices.get(None)
        if always is not None:
            return self._dense_result(always, linearize_field(g, t, x), x)
        made = self._made(g, t, x, choices)
        choice, field = made.choice, made.followed.field
        if made.contraction is not None:
            return _exactly(field.value, made.followed.divergence(made.contraction, self.chunk_size))
        if made.local is None:
            return self._dense_result(choice, field, x)
        return _exactly(field.value, made.local.divergence(x, choice.plan.chunk_size, self.chunk_size is not None))

    def _dense_result(self, choice: _Choice, field: Linearization, x: Tensor) -> Estimate:
        return _exactly(field.value, dense.reverse(field, x, choice.plan.chunk_size, self.chunk_size is not None))

    def _made(self, g: Field, t: Tensor, x: Tensor, choices: _Choices) -> _Made:
        """Evaluate once; what was chosen when the field did the same before, or a new choice."""
        states, verify, watcher = rng_states(x), choices.due(), watch(AtTime(g, t), x)
        before = state_of(g) if verify else None
        products = torch.is_grad_enabled() or verify or choices.products() or watcher is not None
        followed, made = None, None
        try:
            followed = follow(g, t, x, products, verify, watcher)
            made = self._known(g, t, x, choices, followed, states, verify)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Without products x needs no gradient, which a field may ask of it: below it is evaluated as autograd
            # would, and what is wrong with the field itself is raised.
            if products:
                raise
        if made is not None:
            return made
        if not products or followed is None:
            set_rng_states(states)
            before, verify = state_of(g), True
            followed = follow(g, t, x, products=True, verify=True)
        if not verify:
            # Right for this evaluation, whatever it did; a choice for the like of it is made at the next.
            choices.surprise()
            return _Made(_Choice(self._dense(x, "dense products: it did other operations than before")), followed)
        choices.stateful = state_of(g) != before
        return self._new(g, t, x, choices, followed, states)

    def _known(
        self, g: Field, t: Tensor, x: Tensor, choices: _Choices, followed: Followed, states: list[Tensor], verify: bool
    ) -> _Made | None:
        """What was chosen for this structure, verified if it is due; None if there is nothing, or it is wrong."""
        choice = choices.get(followed.signature)
        if choice is None or followed.hides():
            return None
        try:
            if choice.coloring is not None:
                evaluated = local.evaluate(g, t, x, followed, choice.coloring, states, verify)
                return _Made(choice, followed, local=evaluated)
            contraction = followed.contraction()
            if verify:
                followed.verify(contraction)
        except (NoRule, NotLocal):
            return None
        return _Made(choice, followed, contraction)

    def _new(
        self, g: Field, t: Tensor, x: Tensor, choices: _Choices, followed: Followed, states: list[Tensor]
    ) -> _Made:
        """Choose for what the field did, and remember the choice."""
        if self.method == "auto" and len(choices) >= _MOST_STRUCTURES:
            made = _Made(_Choice(self._dense(x, "dense products: it does other operations at every call")), followed)
        else:
            made = self._choose(g, t, x, followed, states, choices.stateful)
        dense_products = made.choice.plan.method == "reverse"
        # Nothing can be verified where the value is infinite or NaN.
        if not dense_products or followed.field.value.isfinite().all():
            choices.add(None if dense_products else followed.signature, made.choice)
        return made

    def prefers_one_time(self, g: Field, t: Tensor, x: Tensor) -> bool:
        """True where gates that depend on a scalar t alone can be folded into the matrices of a layered network."""
        if own.applies(self.method, g, x):
            return False
        shared = self.explain(g, t, x)
        if shared.method != "layered":
            return False
        return (
            shared.cost_in_forward_passes
            < _WORTH_SEPARATING * self.explain(g, t.expand(len(x)), x).cost_in_forward_passes
        )

    def _choices(self, g: Field, t: Tensor, x: Tensor) -> _Choices:
        """Those made before for this field, or new ones, which are kept."""
        settled = self.method in ("forward", "reverse")
        if settled or x.numel() == 0 or torch.compiler.is_compiling() or transformed():
            choices = _Choices()
            choices.add(None, _Choice(self._dense(x, "asked for" if settled else "there is nothing to gain")))
            return choices
        kept = _CHOICES.get(g, self, *circumstances(t, x))
        if kept is None:
            kept = _Choices()
            _CHOICES.keep(kept, g, self, *circumstances(t, x))
        return kept

    def _choose(
        self, g: Field, t: Tensor, x: Tensor, followed: Followed, states: list[Tensor], changes_itself: bool
    ) -> _Made:
        reasons = []
        if self.method in ("auto", "layered"):
            try:
                contraction = followed.contraction()
                return _Made(_Choice(self._layered(x, followed, contraction)), followed, contraction)
            except NoRule as error:
                reasons.append(f"not layered: {error}".rstrip(","))
        if self.method in ("auto", "colored"):
            try:
                if changes_itself:
                    raise NotLocal("the field changes its own state when it is evaluated")
                found = local.choose(g, t, x, followed, states)
                return _Made(_Choice(self._colored(x, found, followed), found.coloring), followed, local=found)
            except NotLocal as error:
                reasons.append(f"not colored: {error}")
        if self.method != "auto":
            raise FieldError(
                f"method={self.method!r} does not apply to this field ({'; '.join(reasons)}); use "
                "method='auto', which takes the cheapest that does"
            )
        return _Made(_Choice(self._dense(x, f"dense products: {'; '.join(reasons)}", followed)), followed)

    def _layered(self, x: Tensor, followed: Followed, contraction: Contraction) -> Plan:
        followed.verify(contraction)
        value, products = max(1, followed.trace.multiplications), followed.cost(contraction)
        memory = contraction.memory(len(x), x) * x.element_size()
        if self.method == "auto" and products > value * event_size(x):
            raise NoRule("its paths take longer than dense products")
        if self.method == "auto" and memory > _LARGEST_MEMORY:
            raise NoRule(f"its matrices take {memory / 2**30:.1f} GiB")
        count, cut = len(contraction.cycles), contraction.cut
        paths = "one path" if count == 1 else f"{count} paths"
        why = f"{paths} of linear maps and elementwise functions, multiplied out for the whole batch"
        if cut:
            rows = sum(base.size for base in cut)
            why += f", and {'one row' if rows == 1 else f'{rows} rows'} carried through {len(cut)} of its places"
        cost = 1 + products / value
        return Plan("layered", why, 0, 1, cost, cost / 2, memory)

    def _colored(self, x: Tensor, found: Local, followed: Followed) -> Plan:
        count = found.products
        if self.method == "auto" and count > _WORTH_COLORING * event_size(x):
            raise NotLocal(f"it takes {found.why}")
        # A network of images has far more activations than its states have entries.
        chunk = self._chunk_size(x, count, max(1, followed.trace.elements // x.numel()))
        memory = self._memory(x, chunk, followed)
        return Plan("colored", f"a local field: {found.why}", count, chunk, 1 + count, (1 + count) / 2, memory)

    def _dense(self, x: Tensor, why: str, followed: Followed | None = None) -> Plan:
        size = event_size(x)
        # A pass holds the gradients of all values between: where these are large, a few products fill the cache.
        between = 0 if followed is None else followed.trace.elements // max(1, x.numel())
        chunk = self._chunk_size(x, size, max(1, between // _LIGHTER))
        method = "forward" if self.method == "forward" else "reverse"
        return Plan(method, why, size, chunk, 1 + size, (1 + size) / 2, self._memory(x, chunk, followed))

    def _memory(self, x: Tensor, chunk: int, followed: Followed | None) -> int:
        """Each product of a pass holds about what the value's evaluation does."""
        elements = x.numel() if followed is None else followed.trace.elements
        return chunk * elements * x.element_size()

    def _chunk_size(self, x: Tensor, count: int, activations: int = 1) -> int:
        return min(self.chunk_size or dense.products_per_pass(x, activations), max(count, 1))


def _exactly(value: Tensor, divergence: Tensor) -> Estimate:
    return Estimate(value, divergence, torch.zeros_like(divergence, requires_grad=False))

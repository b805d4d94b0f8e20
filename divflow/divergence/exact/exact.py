"""The exact divergence: the choice of the method, and its reason."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from divflow.divergence.around import around
from divflow.divergence.estimator import Estimate, Estimator
from divflow.divergence.exact.colored.method import Colored
from divflow.divergence.exact.conditioned import given
from divflow.divergence.exact.dense import Dense
from divflow.divergence.exact.followed import Followed, follow
from divflow.divergence.exact.forward import Forward
from divflow.divergence.exact.layered.method import Layered
from divflow.divergence.exact.method import Evaluation, Method, Prepared, Refusal
from divflow.divergence.exact.own import Own
from divflow.errors import FieldError, check_count
from divflow.operators.compiled import eagerly
from divflow.operators.context import Context
from divflow.operators.field import AtTime, Field, as_time, checked_state
from divflow.operators.plan import Plan, conditions
from divflow.operators.transformed import transformed
from divflow.tape.checkpoints import CheckpointedError
from divflow.tape.randomness import rng_states, set_rng_states
from divflow.verification.anew import note_new
from divflow.verification.kept import Plans
from divflow.verification.schedule import Schedule, record_of
from divflow.verification.state import state_of
from divflow.verification.watch import watch

__all__ = ["Exact"]

# In this order; a field that none of them serves takes dense products.
_OWN = Own()
_OF_STRUCTURE: tuple[Method, ...] = (Layered(), Colored())
_METHODS = ("auto", _OWN.name, *(method.name for method in _OF_STRUCTURE), "forward", "reverse")
# Relative cost from which a batch for each time pays, in spite of its smaller matrix products.
_WORTH_SEPARATING = 0.5
# Plans for one field, after which it counts as one that never does the same twice.
_MOST_STRUCTURES = 8


class _Known(NamedTuple):
    """The method for evaluations of one structure, and what it keeps for them."""

    method: Method
    kept: Any


class _Structures:
    """What is known of one field, by what it did; under None, whatever it does.

    Attributes:
        schedule: of its calls.
        latest: the latest plan.
        stateful: whether the field was seen to change itself, so that it must be evaluated only once per call.
    """

    def __init__(self) -> None:
        self._by_signature: dict[Hashable, _Known] = {}
        self.schedule = Schedule()
        self.latest: Plan | None = None
        self.stateful = False

    def get(self, signature: Hashable) -> _Known | None:
        """What is known of a structure."""
        return self._by_signature.get(signature)

    def add(self, signature: Hashable, known: _Known, plan: Plan) -> None:
        """Remember a structure, in place of what was known of it."""
        self._by_signature[signature] = known
        self.latest = plan

    def __len__(self) -> int:
        return len(self._by_signature)

    def products(self) -> bool:
        """Whether products with the Jacobian may be needed, beside those of a verification."""
        return self.stateful or any(not isinstance(known.method, Layered) for known in self._by_signature.values())

    def reading(self) -> bool:
        """Whether a closed form may be needed."""
        return not self._by_signature or any(isinstance(known.method, Layered) for known in self._by_signature.values())


_STRUCTURES: Plans[_Structures] = Plans()


@dataclass(frozen=True)
class Exact(Estimator):
    """Compute the exact divergence of any field, by the cheapest method that applies.

        (div g)_b = sum_i e_i^T J_b e_i

    The choice is made at the first call for a field and shape of x, which takes longer than the following ones. `explain`
    reports the choice and its reason. All methods are differentiable in x, t and parameters, to any order that the field
    supports.

    Args:
        method: the way to the trace.

            - "auto" takes the cheapest that applies.
            - "own" takes the field's own formula, a method `value_and_divergence(t, x)` that returns `(k, *event)` and
              `(k,)`, and compares it with autograd (see `divflow.divergence.exact.own`).
            - "layered" has a closed form for networks of linear maps and elementwise functions. It costs about one probe
              (one vector-Jacobian product), whatever D is (see `divflow.divergence.exact.layered`).
            - "colored" takes one product for many dimensions of a local field, such as a convolutional network (see
              `divflow.divergence.exact.colored.colors`). Each statistic of a normalization in it, such as GroupNorm, adds
              two products, and the field is evaluated three times (see `divflow.divergence.exact.colored.held`).
            - "reverse" takes rows of the Jacobian, from one evaluation of the field.
            - "forward" takes columns by `torch.func.jvp`, for fields with forward-mode rules. It evaluates the field once
              per pass. Torch's rules are compared with products in reverse (see `divflow.divergence.exact.forward`).
        chunk_size: basis vectors per pass; None takes what suits the device.

            - Peak memory grows with it and not with D.
            - If it is given, the bound holds in training, too: the backward pass computes each chunk again, at about a
              third more time.

    Raises:
        ValueError: an unknown method, or a chunk size below 1.
        FieldError: at a call, if `method="own"`, `"layered"` or `"colored"` does not apply, or the field's own divergence
            is wrong; the message has the reason.

    Example:
        >>> import torch
        >>> from divflow.divergence import divergence
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> def field(t, x):
        ...     return net(x)
        >>> x = torch.randn(5, 3)
        >>> divergence(field, 0.0, x, Exact()).shape
        torch.Size([5])
        >>> torch.allclose(divergence(field, 0.0, x), divergence(field, 0.0, x, Exact("reverse")), atol=1e-5)
        True
    """

    method: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method must be one of {list(_METHODS)}, but is {self.method!r}")
        if self.chunk_size is not None:
            check_count("chunk_size, unless it is None,", self.chunk_size)

    @eagerly
    def explain(
        self, g: Callable[..., Tensor], t: Tensor | float, x: Tensor, *, context: Context | None = None
    ) -> Plan:
        """Report what a call with these arguments does, why, and what it is expected to cost.

        The field is evaluated, unless its plan is known. The reason also says if a suspect field could not be compared with
        central differences, such as one that keeps a state (`divflow.verification`).

        Args:
            g: the field, `g(t, x)`, or `g(t, x, context)` with a context.
            t: time, a scalar or `(k,)`.
            x: states `(k, *event)`.
            context: as in `divergence`.

        Returns:
            A `Plan`: the method, the reason, the number of products, and costs in forward passes, probes and bytes.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
            >>> plan = Exact().explain(lambda t, x: net(x), 0.0, torch.randn(5, 3))
            >>> plan.method, plan.products
            ('layered', 0)
        """
        x = checked_state(x)
        t, g = as_time(t, x), given(g, context, x)
        if (near := around(g, x, estimated=False)) is not None:
            g, x = near[0], near[1].origin
        plan, note = self._explained(self._evaluation(g, t, x)), record_of(AtTime(g, t), x).note
        return plan._replace(why=f"{plan.why}; {note}") if note else plan

    def estimate(self, g: Field, t: Tensor | float, x: Tensor, generator: Generator | None = None) -> Estimate:
        """Return the value, the exact divergence and a standard error of zero; `generator` is not used."""
        x = checked_state(x)
        evaluation = self._evaluation(g, as_time(t, x), x)
        prepared = self._at_once(evaluation)
        if prepared is None:
            structures = self._structures(evaluation)
            always = structures.get(None)
            prepared = _always(evaluation, always) if always is not None else self._followed(evaluation, structures)
        value, divergence = prepared.take()
        return Estimate(value, divergence, torch.zeros_like(divergence, requires_grad=False))

    def prefers_one_time(self, g: Field, t: Tensor, x: Tensor) -> bool:
        """True if gates that depend on a scalar t alone can be folded into the matrices of a layered network."""
        shared = self.explain(g, t, x)
        if shared.method != "layered":
            return False
        own = self.explain(g, t.expand(len(x)), x)
        return shared.cost_in_forward_passes < _WORTH_SEPARATING * own.cost_in_forward_passes

    def _evaluation(self, g: Field, t: Tensor, x: Tensor) -> Evaluation:
        return Evaluation(g, t, x, self.chunk_size, asked=self.method != "auto")

    def _structures(self, evaluation: Evaluation) -> _Structures:
        known = evaluation.g, self, *conditions(evaluation.t, evaluation.x)
        structures = _STRUCTURES.get(*known)
        if structures is None:
            note_new(evaluation.g, len(evaluation.x))
            _STRUCTURES.keep(structures := _Structures(), *known)
        return structures

    def _at_once(self, evaluation: Evaluation) -> Prepared | None:
        """Use a method that need not see what the field does, if one was requested or serves."""
        if self.method == "forward":
            return Forward().prepare(evaluation)
        if self.method == "reverse":
            return Dense().prepare(evaluation)
        if evaluation.x.numel() == 0 or torch.compiler.is_compiling() or transformed():
            return Dense("there is nothing to gain").prepare(evaluation)
        if self.method in ("auto", "own"):
            prepared = _OWN.prepare(evaluation)
            return prepared if isinstance(prepared, Prepared) else None
        return None

    def _explained(self, evaluation: Evaluation) -> Plan:
        x = evaluation.x
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            prepared = self._at_once(evaluation)
            if prepared is None:
                structures = self._structures(evaluation)
                if structures.latest is not None:
                    return structures.latest
                prepared = self._followed(evaluation, structures)
            return prepared.plan()

    def _followed(self, evaluation: Evaluation, structures: _Structures) -> Prepared:
        """Evaluate once; use the choice for an evaluation of the same structure, or make a new one."""
        g, t, x = evaluation.g, evaluation.t, evaluation.x
        verify, watcher = structures.schedule.due(), watch(AtTime(g, t), x)
        evaluation.states, before = rng_states(x), state_of(g) if verify else None
        products = torch.is_grad_enabled() or verify or structures.products() or watcher is not None
        try:
            evaluation.followed = follow(g, t, x, products, verify, watcher, read=verify or structures.reading())
            prepared = _as_before(evaluation, evaluation.followed, structures, verify)
        except (torch.OutOfMemoryError, FieldError):
            raise
        except Exception as error:
            if products:
                return self._not_followed(evaluation, structures, error)
            # Without products x has no gradient, which a field may ask for: below it is evaluated as by autograd.
            evaluation.followed = prepared = None
        if prepared is not None:
            return prepared
        if not products or evaluation.followed is None:
            set_rng_states(evaluation.states)
            before, verify = state_of(g), True
            try:
                evaluation.followed = follow(g, t, x, products=True, verify=True)
            except (torch.OutOfMemoryError, FieldError):
                raise
            except Exception as error:
                return self._not_followed(evaluation, structures, error)
        if not verify:
            # Right for this evaluation, whatever it did; the next call makes a choice for this structure.
            structures.schedule.surprise()
            return Dense("dense products: its operations differ from those of earlier calls").prepare(evaluation)
        structures.stateful = evaluation.stateful = state_of(g) != before
        return self._new(evaluation, evaluation.followed, structures)

    def _not_followed(self, evaluation: Evaluation, structures: _Structures, error: Exception) -> Prepared:
        """Evaluate a field plainly that fails while it is followed; an error of the field itself is raised."""
        set_rng_states(evaluation.states)
        evaluation.linearized()
        why = (
            str(error)
            if isinstance(error, CheckpointedError)
            else f"it raises {type(error).__name__} while it is followed"
        )
        dense = Dense(f"dense products: {why}")
        prepared = dense.prepare(evaluation)
        structures.add(None, _Known(dense, prepared.kept), prepared.plan())
        return prepared

    def _new(self, evaluation: Evaluation, followed: Followed, structures: _Structures) -> Prepared:
        """Choose for what the field did, and remember the choice."""
        method, prepared = self._chosen(evaluation, len(structures))
        everything = isinstance(method, Dense)
        # Nothing can be verified where the value is infinite or NaN.
        if not everything or followed.field.value.isfinite().all():
            structures.add(None if everything else followed.signature, _Known(method, prepared.kept), prepared.plan())
        return prepared

    def _chosen(self, evaluation: Evaluation, structures: int) -> tuple[Method, Prepared]:
        """The first method that serves, in their order, or the cheapest if a later one may be cheaper."""
        reasons, serving = [], list[tuple[Method, Prepared]]()
        if not evaluation.asked and structures >= _MOST_STRUCTURES:
            reasons.append("its operations differ at every call")
        else:
            for method in _OF_STRUCTURE:
                if self.method in ("auto", method.name):
                    prepared = method.prepare(evaluation)
                    if isinstance(prepared, Refusal):
                        reasons.append(prepared.reason)
                        continue
                    serving.append((method, prepared))
                    if prepared.settled:
                        break
        if serving:
            return min(serving, key=lambda item: item[1].plan().cost_in_forward_passes)
        if evaluation.asked:
            raise FieldError(
                f"method={self.method!r} does not apply to this field ({'; '.join(reasons)}). Use "
                "method='auto', which takes the cheapest method that applies."
            )
        dense = Dense(f"dense products: {'; '.join(reasons)}")
        return dense, dense.prepare(evaluation)


def _always(evaluation: Evaluation, known: _Known) -> Prepared:
    prepared = known.method.prepare(evaluation, known.kept)
    assert isinstance(prepared, Prepared)  # dense products serve every field
    return prepared


def _as_before(evaluation: Evaluation, followed: Followed, structures: _Structures, verify: bool) -> Prepared | None:
    """Prepare from what is known of this structure, verified if due; None if nothing is known or it is wrong."""
    known = structures.get(followed.signature)
    if known is None:
        return None
    prepared = known.method.prepare(evaluation, known.kept, verify)
    return None if isinstance(prepared, Refusal) else prepared

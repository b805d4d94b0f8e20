"""A trajectory, and the divergences at nodes along it."""

import copy
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.divergence import Estimator
from divflow.errors import DivflowError, FieldError
from divflow.likelihood.conditioned import ConditionedField
from divflow.likelihood.penalties import PENALTIES
from divflow.operators.field import flatten_event
from divflow.operators.progress import report
from divflow.solver import Evaluations, Solver
from divflow.solver.dense_output import Steps
from divflow.solver.step_control import COARSELY_INTERPOLATED, StepTimes, as_times, steps_for_one

__all__ = ["Along", "AtNodes"]

# Elements of the states of all nodes in one batch. Larger batches make larger matrix products, but an image network's
# activations at all nodes would not fit in memory.
_CPU_BATCH, _ACCELERATOR_BATCH = 2**18, 2**22
# Elements of the stages that a solve without a graph may keep, for nodes that are chosen later.
_MOST_ELEMENTS = 2**26


class Along:
    """The path of a batch from one time to another, and the divergences along it.

    It is solved once if the solver can interpolate between its steps afterwards (`dense`), else for each set of nodes.

    Args:
        field: the velocity.
        x: states at the start.
        start: a scalar tensor, the first time.
        end: the last one.
        solver: of the trajectory.
        evaluations: a counter to add to.
        chosen_later: whether several sets of nodes will be chosen, one after another.
    """

    def __init__(
        self,
        field: ConditionedField,
        x: Tensor,
        start: Tensor,
        end: Tensor,
        solver: Solver,
        evaluations: Evaluations,
        chosen_later: bool,
    ) -> None:
        self.field, self.x, self.start, self.end = field, x, start, end
        self.solver, self.evaluations = solver, evaluations
        self.knots, self._knot_times = self._between_jumps()
        self._outputs = x.new_zeros(0)
        # Times that are differentiated must be torchdiffeq's own outputs.
        differentiated = torch.is_grad_enabled() and (start.requires_grad or end.requires_grad)
        self.dense = chosen_later and solver.dense and not differentiated and x.numel() > 0
        if self.dense:
            self._steps = Steps(start, end, None if torch.is_grad_enabled() else _MOST_ELEMENTS // (7 * x.numel()))
            self.final = self._solve(torch.stack([start, end]), self._steps)[-1]
            self.dense = not self._steps.overflowed

    def states(self, nodes: Tensor) -> Tensor:
        """Return the states at increasing nodes, `(nodes, k, *event)`; `final` is the state at the end."""
        if self.dense:
            return self._steps.states(self._times(nodes))
        states = self._solve(self._with_ends(nodes))
        self._outputs = nodes if self.solver.method in COARSELY_INTERPOLATED else nodes[:0]
        self.final = states[-1]
        return states[1:-1]

    @torch.no_grad()
    def finer(self, nodes: Tensor) -> "tuple[Along, Tensor]":
        """Return this path by steps of half the length, and the states at the nodes on it."""
        other = copy.copy(self)
        other.x, other.start, other.end = self.x.detach(), self.start.detach(), self.end.detach()
        other.evaluations = Evaluations()
        other.solver, other.dense = self.solver.finer(self._accepted, other.start, other.end), False
        return other, other.states(nodes)

    def steps(self, low: float, high: float) -> float:
        """How many steps the solver took in a part of the way in the latest solve, in units of dopri5's steps.

        It counts the steps that the velocity required, without those that only end at wanted outputs. Zero for a solver that
        does not choose its steps.
        """
        if not self.solver.adaptive:
            return 0.0
        outputs = 0
        if not self.dense and len(self._outputs):  # the host waits
            outputs = int(((self._outputs > low) & (self._outputs < high)).sum())
        taken = max(0, self._accepted.within(low, high) - outputs)
        return taken / steps_for_one(self.solver.method, self.solver.rtol)

    def allowance(self) -> Tensor:
        """The largest error of the state that the tolerances of all steps allow together, `(k,)`."""
        size = flatten_event(torch.maximum(self.x.abs(), self.final.abs())).detach()
        of_a_step = (self.solver.atol + self.solver.rtol * size).norm(dim=1)
        return (2 + len(self._accepted)) * of_a_step

    def speed(self, nodes: Tensor) -> Tensor:
        """Compute dt / dnode at the nodes: the span, differentiable in start and end with jumps held in place."""
        if len(self.knots) == 2:
            return self.end - self.start
        _, _, slopes = self._parts(nodes)
        return slopes

    def _between_jumps(self) -> tuple[list[float], Tensor]:
        """Fractions of the way, from 0 to 1, between which the velocity does not jump, and the times there."""
        ends = torch.stack([self.start, self.end])
        jumps = (self.solver.options or {}).get("jump_t")
        if jumps is None or not self.solver.adaptive:
            return [0.0, 1.0], ends
        low, high = sorted(ends.tolist())
        times = as_times(jumps, ends)
        times = times[(times > low) & (times < high)]
        times = times if bool(self.start < self.end) else times.flip(0)
        shares = ((times - self.start) / (self.end - self.start)).tolist()
        return [0.0, *shares, 1.0], torch.cat([ends[:1], times, ends[1:]])

    def _solve(self, times: Tensor, record: Steps | None = None) -> Tensor:
        self._accepted = StepTimes(self.start, self.end)
        (states,) = self.solver.solve(
            lambda t, state: (self.field(t, state[0]),),
            (self.x,),
            times,
            evaluations=self.evaluations,
            parameters=self.field.differentiable_tensors(),
            record=record,
            accepted=self._accepted,
            size=self.field.finest_scale,
        )
        return states

    def at_nodes(
        self,
        nodes: Tensor,
        states: Tensor,
        estimator: Estimator,
        generator: Generator | None,
        penalties: Collection[str] = (),
    ) -> "AtNodes":
        """Evaluate the divergences, the velocities and the penalties' integrands at all nodes."""
        times, size, count = self._times(nodes), self._nodes_per_batch(estimator), len(nodes)
        bundles, parts, done = [min(size, count - i) for i in range(0, count, size)], [], 0
        for bundle, part in zip(bundles, estimator.along(self.x, bundles, generator), strict=True):
            chosen = slice(done, done + bundle)
            parts.append(self._at_bundle(times[chosen], states[chosen], part, generator, penalties))
            done += bundle
            report("nodes", done, count)
        return AtNodes.cat(parts)

    def _times(self, nodes: Tensor) -> Tensor:
        if len(self.knots) == 2:
            return self.start + (self.end - self.start) * nodes
        begin, share, slopes = self._parts(nodes)
        return begin + slopes * share

    def _parts(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the part between two jumps that each node is in: its time, how far into it the node is, and dt / dnode."""
        knots = nodes.new_tensor(self.knots)
        part = (torch.searchsorted(knots, nodes.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        slopes = (self._knot_times[1:] - self._knot_times[:-1]) / (knots[1:] - knots[:-1])
        return self._knot_times[part], nodes - knots[part], slopes[part]

    def _with_ends(self, nodes: Tensor) -> Tensor:
        return torch.cat([self.start.view(1), self._times(nodes), self.end.view(1)])

    def _nodes_per_batch(self, estimator: Estimator) -> int:
        if estimator.frozen or not self.field.sample_times:
            return 1
        if len(self.x) and estimator.prefers_one_time(self.field, self.start, self.x):
            return 1
        limit = _CPU_BATCH if self.x.device.type == "cpu" else _ACCELERATOR_BATCH
        return max(1, limit // max(1, self.x.numel()))

    def _at_bundle(
        self,
        times: Tensor,
        states: Tensor,
        estimator: Estimator,
        generator: Generator | None,
        penalties: Collection[str],
    ) -> "AtNodes":
        count, batch = states.shape[:2]
        self.evaluations.divergence += count
        field, t, x = self.field, times[0], states[0]
        if count > 1:
            field, t, x = self.field.repeat(count), times.repeat_interleave(batch), states.flatten(0, 1)
        try:
            estimate = estimator.estimate(field, t, x, generator)
        except (RuntimeError, ValueError, IndexError) as error:
            if count > 1 and not isinstance(error, DivflowError | torch.OutOfMemoryError):
                self._explain(error, times[0], states)
            raise
        integrands = [PENALTIES[name](estimate, field, t, x, generator) for name in penalties]
        if integrands and "jacobian_norm" in penalties and estimate.products is None:
            self.evaluations.divergence += count
        columns = (
            estimate.divergence,
            estimate.standard_error,
            estimate.samples,
            torch.stack(integrands) if integrands else None,
            flatten_event(estimate.value.detach()).T,
        )
        return AtNodes._make(None if column is None else column.unflatten(-1, (count, batch)) for column in columns)

    @torch.no_grad()
    def _explain(self, error: Exception, t: Tensor, states: Tensor) -> None:
        """Explain why a velocity fails for all nodes as one batch, if it works for those of one.

        Raises:
            FieldError: with both batches and the remedy.
        """
        count, batch = states.shape[:2]
        try:
            self.field(t.expand(batch), states[0].detach())
        except Exception:
            return
        raise FieldError(
            f"the velocity fails for the states of {count} nodes as one batch, {(count * batch, *states.shape[2:])}, but not for those of "
            f"one, {tuple(states.shape[1:])}: it holds a tensor with a row for each of {batch} samples, like a closure over a batch of "
            "conditions. Pass that as the context, whose rows follow the states: flow.log_prob(x, context), velocity(t, x, context)."
        ) from error


class AtNodes(NamedTuple):
    """What is known at the nodes; all `(..., nodes, k)`, None if unknown.

    `samples` are the independent estimates whose mean the divergence is; penalties are in the order of the request; the
    velocity is `(D, nodes, k)`.
    """

    divergence: Tensor
    standard_error: Tensor | None
    samples: Tensor | None
    penalties: Tensor | None
    velocity: Tensor

    @classmethod
    def cat(cls, parts: "Sequence[AtNodes]") -> "AtNodes":
        """Concatenate the nodes of all parts."""
        return cls._make(None if None in column else torch.cat(column, dim=-2) for column in zip(*parts, strict=True))

    def part(self, nodes: slice) -> "AtNodes":
        """Select some of the nodes."""
        return AtNodes._make(None if column is None else column[..., nodes, :] for column in self)

    def between(self, others: "AtNodes") -> "AtNodes":
        """Insert these nodes between the others, one each."""
        return AtNodes._make(
            None
            if old is None or new is None
            else torch.cat([torch.stack([new[..., :-1, :], old], dim=-2).flatten(-3, -2), new[..., -1:, :]], dim=-2)
            for old, new in zip(self, others, strict=True)
        )

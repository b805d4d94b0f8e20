"""A trajectory, and the divergences at nodes along it."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.dense_output import Steps
from divflow.divergence import Estimator
from divflow.likelihood.conditioned import ConditionedField
from divflow.likelihood.penalties import PENALTIES
from divflow.solver import Evaluations, Solver

__all__ = ["Along", "AtNodes"]

# Elements of the states of all nodes that are evaluated as one batch. Larger batches make larger matrix
# products, but an image network's activations at all nodes would not fit in memory.
_CPU_BATCH, _ACCELERATOR_BATCH = 2**18, 2**22
# Elements of the stages that a solve without a graph may hold, for nodes that are chosen later.
_MOST_ELEMENTS = 2**26


class Along:
    """The path of a batch from one time to another, and the divergences along it.

    It is solved once where the solver can tell states between its steps afterwards (`dense`), else for each set of nodes.

    Args:
        field: the velocity.
        x: states at the start.
        start: a scalar tensor, the first time.
        end: the last one.
        solver: of the trajectory.
        evaluations: a counter to add to.
        chosen_later: whether nodes will be chosen one set after another.
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
        # Times that are differentiated are torchdiffeq's own outputs.
        differentiated = torch.is_grad_enabled() and (start.requires_grad or end.requires_grad)
        self.dense = chosen_later and solver.dense and not differentiated and x.numel() > 0
        if self.dense:
            self._steps = Steps(start, end, None if torch.is_grad_enabled() else _MOST_ELEMENTS // (7 * x.numel()))
            self.final = self._solve(torch.stack([start, end]), self._steps)[-1]
            self.dense = not self._steps.overflowed

    def states(self, nodes: Tensor) -> Tensor:
        """The states at increasing nodes, `(nodes, k, *event)`; `final` is the one at the end."""
        times = self._times(nodes)
        if self.dense:
            return self._steps.states(times)
        states = self._solve(torch.cat([self.start.view(1), times, self.end.view(1)]))
        self.final = states[-1]
        return states[1:-1]

    def _solve(self, times: Tensor, record: Steps | None = None) -> Tensor:
        (states,) = self.solver.solve(
            lambda t, state: (self.field(t, state[0]),),
            (self.x,),
            times,
            evaluations=self.evaluations,
            parameters=self.field.differentiable_tensors(),
            record=record,
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
        """The divergences, and the penalties' integrands, at all nodes."""
        times, size, count = self._times(nodes), self._nodes_per_batch(estimator), len(nodes)
        bundles, parts, done = [min(size, count - i) for i in range(0, count, size)], [], 0
        for bundle, part in zip(bundles, estimator.along(self.x, bundles, generator), strict=True):
            chosen = slice(done, done + bundle)
            parts.append(self._at_bundle(times[chosen], states[chosen], part, generator, penalties))
            done += bundle
        return AtNodes.cat(parts)

    def _times(self, nodes: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * nodes

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
        estimate = estimator.estimate(field, t, x, generator)
        integrands = [PENALTIES[name](estimate, field, t, x, generator) for name in penalties]
        if integrands and "jacobian_norm" in penalties and estimate.products is None:
            self.evaluations.divergence += count
        columns = (
            estimate.divergence,
            estimate.standard_error,
            estimate.samples,
            torch.stack(integrands) if integrands else None,
        )
        return AtNodes._make(None if column is None else column.unflatten(-1, (count, batch)) for column in columns)


class AtNodes(NamedTuple):
    """What is known at the nodes; all `(..., nodes, k)`, None what is not.

    `samples` are the independent estimates that the divergence is the mean of; penalties come first-to-last as asked for.
    """

    divergence: Tensor
    standard_error: Tensor | None
    samples: Tensor | None
    penalties: Tensor | None

    @classmethod
    def cat(cls, parts: "Sequence[AtNodes]") -> "AtNodes":
        """The nodes of all parts, one part after another."""
        return cls._make(None if None in column else torch.cat(column, dim=-2) for column in zip(*parts, strict=True))

    def part(self, nodes: slice) -> "AtNodes":
        """Some of the nodes."""
        return AtNodes._make(None if column is None else column[..., nodes, :] for column in self)

    def between(self, others: "AtNodes") -> "AtNodes":
        """These nodes, each between two of the others."""
        return AtNodes._make(
            None
            if old is None or new is None
            else torch.cat([torch.stack([new[..., :-1, :], old], dim=-2).flatten(-3, -2), new[..., -1:, :]], dim=-2)
            for old, new in zip(self, others, strict=True)
        )

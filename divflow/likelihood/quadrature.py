"""The log-determinant by Gauss-Kronrod quadrature along a trajectory that is solved first."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from divflow.arguments import check_count, check_positive
from divflow.divergence import Estimator
from divflow.divergence.hutchinson import standard_error_of_mean
from divflow.likelihood.conditioned import ConditionedField
from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.likelihood.penalties import PENALTIES
from divflow.likelihood.transport import Likelihood, Transport
from divflow.solver import Evaluations, Solver, SolverError

__all__ = ["Quadrature"]

# Elements of the states of all nodes that are evaluated as one batch. Larger batches make larger matrix
# products, but an image network's activations at all nodes would not fit in memory.
_CPU_BATCH, _ACCELERATOR_BATCH = 2**18, 2**22

Interval = tuple[float, float]


@dataclass(frozen=True)
class Quadrature(Likelihood):
    """Solve the trajectory with the plain velocity, then integrate the divergence at Gauss-Kronrod nodes.

        log_det = (t_end - t_start) * sum_i w_i (div v)(t_i, x_{t_i})

    The log-density does not feed back into the trajectory, so the solver never evaluates a divergence.
    A stochastic estimator draws fresh probes at each node, those of one sample mutually orthogonal where the
    estimator can (`Hutchinson`): the estimate stays unbiased, since the trajectory does not depend on the
    probes, and the errors of the nodes cancel where those of one probe for a whole solve add up.

    The Kronrod rule converges like a polynomial of degree (3 nodes - 1) / 2 as long as the divergence is
    smooth in time; a field with kinks (ReLU) has one that jumps.

    Args:
        nodes: an odd number, at least 3: the Kronrod rule, of which every second node is the Gauss rule
            that estimates the error.
        tolerance: absolute, in nats, for every sample: intervals are bisected, those of the largest errors first, until
            the estimated errors add up to no more, as the stiff end of a score model near t = 0 needs it. The
            estimate |K - G| is that of the lesser rule; what remains is often a hundred times less. None takes
            the one interval as it is.
        max_intervals: a refinement that needs more raises `SolverError`.

    Raises:
        ValueError: an even or too small number of nodes, or a tolerance or max_intervals out of range.
    """

    nodes: int = 15
    tolerance: float | None = None
    max_intervals: int = 64

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes, least=3)
        gauss_kronrod(self.nodes)
        if self.tolerance is not None:
            check_positive("tolerance, unless it is None,", self.tolerance)
        check_count("max_intervals", self.max_intervals)

    def transport(
        self,
        field: ConditionedField,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
        *,
        estimator: Estimator,
        solver: Solver,
        evaluations: Evaluations,
        generator: Generator | None = None,
        diagnostics: bool = True,
        penalties: Collection[str] = (),
    ) -> Transport:
        """See `Likelihood.transport`.

        The error estimate |K - G| compares the two rules on one set of divergences. Where those are
        stochastic it would be noise; it is then taken from an extra pass with one probe for all nodes, if
        `diagnostics` asks for it.
        """
        along = _Trajectory(field, x, t_start, t_end, solver, evaluations)
        intervals = (
            [(0.0, 1.0)] if self.tolerance is None else self._refine(along, self.tolerance, estimator, generator)
        )
        rule = _composite_rule(self.nodes, intervals, x)
        states = along.states(rule.nodes)
        at_nodes = along.at_nodes(rule.nodes, states[1:-1], estimator, generator, penalties)
        span = t_end - t_start

        quadrature_error = None
        if not estimator.stochastic:
            quadrature_error = _absolute_error(rule, at_nodes.divergence, span)
        elif diagnostics:
            quadrature_error = along.smooth_error(rule, states[1:-1], estimator, generator)
        integrals = {}
        if at_nodes.penalties is not None:
            values = span.abs() * _weighted_sum(rule.kronrod, at_nodes.penalties)
            integrals = dict(zip(penalties, values, strict=True))
        return Transport(
            states[-1],
            span * _weighted_sum(rule.kronrod, at_nodes.divergence),
            quadrature_error,
            _standard_error(rule, at_nodes, span),
            integrals,
        )

    @torch.no_grad()
    def _refine(
        self, along: "_Trajectory", tolerance: float, estimator: Estimator, generator: Generator | None
    ) -> list[Interval]:
        """Bisect intervals until every sample's estimated errors add up to no more than the tolerance."""
        errors: dict[Interval, Tensor] = {}
        fresh = [(0.0, 1.0)]
        while fresh:
            if len(errors) + len(fresh) > self.max_intervals:
                raise SolverError(
                    f"the divergence could not be integrated to {tolerance:g} nats with {self.max_intervals} intervals; "
                    "raise max_intervals or the tolerance, tighten the solver, or use smooth activations"
                )
            rule = _composite_rule(self.nodes, fresh, along.x)
            nodes = along.states(rule.nodes)[1:-1]
            for i, interval in enumerate(fresh):
                states = nodes[i * self.nodes : (i + 1) * self.nodes]
                errors[interval] = along.smooth_error(rule.part(i, self.nodes), states, estimator, generator)
            total = torch.stack(list(errors.values())).sum(dim=0)
            if not torch.isfinite(total).all():
                raise SolverError("the divergence along the trajectory is not finite, so it can't be integrated")
            missed = total > tolerance
            # Where the sum exceeds the tolerance, at least one interval exceeds an equal share of it.
            share = tolerance / len(errors)
            coarse = [interval for interval, error in errors.items() if (error[missed] > share).any()]
            fresh = []
            for low, high in sorted(coarse):  # in the order of time, in which they are solved
                del errors[low, high]
                fresh += [(low, (low + high) / 2), ((low + high) / 2, high)]
        return sorted(errors)


class _Rule(NamedTuple):
    """Nodes in (0, 1), increasing, with the weights of the Kronrod and the Gauss rule."""

    nodes: Float[Tensor, " nodes"]
    kronrod: Float[Tensor, " nodes"]
    gauss: Float[Tensor, " nodes"]

    def part(self, index: int, size: int) -> "_Rule":
        return _Rule(*(tensor[index * size : (index + 1) * size] for tensor in self))


def _composite_rule(count: int, intervals: Sequence[Interval], x: Tensor) -> _Rule:
    return _rule_on(count, tuple(intervals), x.dtype, x.device)


# Copied to a device once, since the host waits for the copy.
@functools.lru_cache(maxsize=64)
def _rule_on(count: int, intervals: tuple[Interval, ...], dtype: torch.dtype, device: torch.device) -> _Rule:
    rule = gauss_kronrod(count)
    low, high = np.array(intervals).T[:, :, None]
    columns = (
        low + (high - low) * rule.nodes,
        (high - low) * rule.kronrod_weights,
        (high - low) * rule.gauss_weights,
    )
    with torch.inference_mode(False):
        return _Rule(*(torch.as_tensor(column.reshape(-1), dtype=dtype, device=device) for column in columns))


def _absolute_error(rule: _Rule, divergences: Tensor, span: Tensor) -> Float[Tensor, " batch"]:
    return (span.detach() * _weighted_sum(rule.kronrod - rule.gauss, divergences.detach())).abs()


def _standard_error(rule: _Rule, at_nodes: "_AtNodes", span: Tensor) -> Float[Tensor, " batch"] | None:
    """Of the log-determinant.

    Independent samples are integrated first, since the errors of one of them at different nodes need not be
    independent; where each node only knows its own error, they are taken for independent.
    """
    if at_nodes.samples is not None:
        return standard_error_of_mean(span.detach() * _weighted_sum(rule.kronrod, at_nodes.samples.detach()))
    if at_nodes.standard_error is None:
        return None
    return _weighted_sum((span.detach() * rule.kronrod).square(), at_nodes.standard_error.square()).sqrt()


def _weighted_sum(
    weights: Float[Tensor, " nodes"], values: Float[Tensor, "*some nodes batch"]
) -> Float[Tensor, "*some batch"]:
    """Not a matrix product, which autocast would round to its half precision."""
    return (weights[:, None].to(values) * values).sum(dim=-2)


class _Trajectory:
    """The path of a batch from t_start to t_end, and the divergences along it."""

    def __init__(
        self, field: ConditionedField, x: Tensor, start: Tensor, end: Tensor, solver: Solver, evaluations: Evaluations
    ) -> None:
        self.field, self.x, self.start, self.end = field, x, start, end
        self.solver, self.evaluations = solver, evaluations

    def states(self, nodes: Tensor) -> Tensor:
        """The states at both ends and at the nodes in between, `(nodes + 2, k, *event)`."""
        times = torch.cat([self.start.view(1), self._times(nodes), self.end.view(1)])
        (states,) = self.solver.solve(
            lambda t, state: (self.field(t, state[0]),),
            (self.x,),
            times,
            evaluations=self.evaluations,
            parameters=self.field.differentiable_tensors(),
        )
        return states

    def at_nodes(
        self,
        nodes: Tensor,
        states: Tensor,
        estimator: Estimator,
        generator: Generator | None,
        penalties: Collection[str] = (),
    ) -> "_AtNodes":
        """The divergences, and the penalties' integrands, at all nodes."""
        times, size, count = self._times(nodes), self._nodes_per_batch(estimator), len(nodes)
        bundles, parts, done = [min(size, count - i) for i in range(0, count, size)], [], 0
        for bundle, part in zip(bundles, estimator.along(self.x, bundles, generator), strict=True):
            chosen = slice(done, done + bundle)
            parts.append(self._at_bundle(times[chosen], states[chosen], part, generator, penalties))
            done += bundle
        return _AtNodes._make(
            None if None in column else torch.cat(column, dim=-2) for column in zip(*parts, strict=True)
        )

    @torch.no_grad()
    def smooth_error(
        self, rule: _Rule, states: Tensor, estimator: Estimator, generator: Generator | None
    ) -> Float[Tensor, " batch"]:
        """|K - G| with probes that are the same at all nodes, which makes the integrand smooth in time."""
        frozen = estimator.freeze(self.x, generator)
        along = self.at_nodes(rule.nodes, states, frozen, None)
        return _absolute_error(rule, along.divergence, self.end - self.start)

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
    ) -> "_AtNodes":
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
        return _AtNodes._make(None if column is None else column.unflatten(-1, (count, batch)) for column in columns)


class _AtNodes(NamedTuple):
    """What is known at the nodes; all `(..., nodes, k)`, None what is not.

    `samples` are the independent estimates that the divergence is the mean of; penalties come first-to-last as asked for.
    """

    divergence: Tensor
    standard_error: Tensor | None
    samples: Tensor | None
    penalties: Tensor | None

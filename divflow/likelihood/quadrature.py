"""The log-determinant by quadrature along a trajectory that is solved first."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from divflow.divergence import Estimator
from divflow.divergence.hutchinson import standard_error_of_mean
from divflow.errors import check_count, check_positive
from divflow.likelihood.along import Along, AtNodes
from divflow.likelihood.conditioned import ConditionedField
from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.likelihood.patterson import COUNTS
from divflow.likelihood.pieces import Piece, Rule, rule_on
from divflow.likelihood.resolved import unseen, weighted_sum
from divflow.likelihood.transport import Finer, Likelihood, Transport
from divflow.solver import Evaluations, Solver, SolverError

__all__ = ["Quadrature"]

_NODES = 15
# The fraction of a trajectory's length that nodes may miss, as long as their rules agree.
_MISSED = 0.01


@dataclass(frozen=True)
class Quadrature(Likelihood):
    """Compute the log-determinant of a flow from the divergence at a few nodes along its trajectory.

        log_det = (t_end - t_start) * sum_i w_i (div v)(t_i, x_{t_i})

    The trajectory is solved first, with the plain velocity. The log-density does not feed back into it, so the solver never
    evaluates a divergence. A stochastic estimator draws fresh probes at each node, mutually orthogonal for one sample if
    the estimator can (`Hutchinson`). The estimate stays unbiased, because the trajectory does not depend on the probes, and
    the errors of the nodes cancel; those of one probe for a whole solve would add up.

    **A number of nodes** selects a Gauss-Kronrod rule. It converges like a polynomial of degree (3 nodes - 1) / 2 as long
    as the divergence is smooth in time. The divergence of a field with kinks (ReLU) jumps.

    **A tolerance** takes as many nodes as it needs:

    - It starts with 7 nodes. If some sample's error is too large, it takes the 15, 31 and 63 of Patterson's rules, each
      with all nodes of the previous one, whose divergences are kept.
    - Beyond these it divides the interval where its errors are, as the stiff end of a score model near t = 0 needs.
    - The trajectory is solved once if `Solver.dense`, else once for each set of nodes.
    - A stochastic estimator is frozen while nodes are chosen, because its noise would look like an error. It then draws
      fresh probes at the chosen nodes.

    **Two rules that agree may both be wrong**: they can miss a layer or an oscillation that the solver has seen.

    - So no interval has fewer nodes than steps of the solver.
    - The nodes' integral of the velocity is compared with the known one.
    - A fixed number of nodes can't be refined. What it misses is added to the error estimate, which is infinite if the
      nodes see nothing of what happens.
    - Times at which the velocity jumps (`jump_t` of the solver's options) end intervals.

    Args:
        nodes: an odd number, at least 3, the nodes of the Kronrod rule. Every second one is a node of the Gauss rule that
            estimates its error. With a tolerance, intervals keep that number and are only divided. None takes 15, or with a
            tolerance as many as necessary.
        tolerance: absolute, in nats, for every sample: of the estimated errors of all intervals together. The estimate is
            the difference of a rule and the smaller one within it, and so the error of the smaller; the remaining error is
            often a hundred times smaller.
        max_intervals: a refinement that needs more raises `SolverError`.

    Raises:
        ValueError: an even or too small number of nodes, or a tolerance or max_intervals out of range.

    Example:
        >>> import torch
        >>> from divflow import ContinuousFlow
        >>> flow = ContinuousFlow(lambda t, x: -x, 2, likelihood=Quadrature(nodes=7))
        >>> result = flow.evaluate(torch.zeros(1, 2))
        >>> result.log_det, result.evaluations.divergence
        (tensor([2.]), 7)
    """

    nodes: int | None = None
    tolerance: float | None = None
    max_intervals: int = 64

    def __post_init__(self) -> None:
        if self.nodes is not None:
            check_count("nodes, unless it is None,", self.nodes, least=3)
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
        """Carry states as `Likelihood.transport`.

        The error estimate compares the two rules on one set of divergences. Stochastic divergences would make it noise; it then
        comes from an extra pass with one probe for all nodes, if `diagnostics` requests it.
        """
        along = Along(field, x, t_start, t_end, solver, evaluations, self.tolerance is not None)
        pieces = [Piece(low, high, self._counts[0]) for low, high in itertools.pairwise(along.knots)]
        at_nodes = None
        if self.tolerance is not None:
            # The evaluations that chose the nodes are the result, unless they were noise or could not keep their graph.
            useful = not estimator.stochastic and (along.dense or not torch.is_grad_enabled())
            with contextlib.nullcontext() if useful else torch.no_grad():
                evaluate = functools.partial(
                    along.at_nodes,
                    estimator=estimator if useful else estimator.freeze(x, generator),
                    generator=generator,
                    penalties=penalties if useful else (),
                )
                pieces, evaluated = self._refine(along, pieces, self.tolerance, evaluate)
            at_nodes = evaluated if useful else None
        rule = self._rule(pieces, x)
        if at_nodes is None:
            states = along.states(rule.nodes)
            at_nodes = along.at_nodes(rule.nodes, states, estimator, generator, penalties)
        speed = along.speed(rule.nodes)
        error, finer = None, None
        smooth, same = at_nodes, estimator
        if estimator.stochastic and diagnostics:
            # With the same probes at all nodes, which makes the integrand smooth in time.
            same = estimator.freeze(x, generator)
            with torch.no_grad():
                smooth = along.at_nodes(rule.nodes, states, same, None)
        if diagnostics or not estimator.stochastic:
            error = _disagreement(rule, smooth.divergence, along).maximum(unseen(rule, smooth, along))
        if diagnostics:
            finer = self._finer(along, rule, smooth, same)
        integrals = {}
        if at_nodes.penalties is not None:
            values = weighted_sum(rule.weights * speed.abs(), at_nodes.penalties)
            integrals = dict(zip(penalties, values, strict=True))
        return Transport(
            along.final,
            weighted_sum(rule.weights * speed, at_nodes.divergence),
            error,
            _standard_error(rule, at_nodes, speed, estimator.frozen),
            integrals,
            finer,
        )

    @staticmethod
    @torch.no_grad()
    def _finer(along: Along, rule: Rule, at_nodes: AtNodes, estimator: Estimator) -> Finer | None:
        if not along.x.numel():
            return None
        try:
            other, states = along.finer(rule.nodes)
        except SolverError:
            return Finer(along.final.detach(), torch.full_like(at_nodes.divergence[0], math.inf))
        moved = other.at_nodes(rule.nodes, states, estimator, None).divergence - at_nodes.divergence
        along.evaluations.diagnostics += other.evaluations.forward + other.evaluations.divergence
        return Finer(other.final, weighted_sum(rule.weights * along.speed(rule.nodes), moved))

    @property
    def _counts(self) -> tuple[int, ...]:
        """Numbers of nodes that an interval takes in turn."""
        return COUNTS if self._nested else (self.nodes or _NODES,)

    @property
    def _nested(self) -> bool:
        return self.nodes is None and self.tolerance is not None

    def _rule(self, pieces: Sequence[Piece], x: Tensor) -> Rule:
        return rule_on(self._nested, tuple(pieces), x.dtype, x.device)

    def _refine(
        self, along: Along, pieces: list[Piece], tolerance: float, evaluate: Callable[[Tensor, Tensor], AtNodes]
    ) -> tuple[list[Piece], AtNodes]:
        """Add nodes to intervals, or divide them.

        Repeats until every sample's estimated errors sum to no more than allowed, and no interval has fewer nodes than steps of
        the solver: two rules that agree may both have overlooked what the solver has seen.
        """
        known: dict[Piece, AtNodes] = {}
        if along.dense:
            pieces = [
                finer for piece in pieces for finer in piece.resolving(along.steps, self._counts, self.max_intervals)
            ]
        coarse: dict[Piece, AtNodes | None] = dict.fromkeys(pieces)
        before = math.inf
        while coarse:
            if len(known) + len(coarse) > self.max_intervals:
                raise SolverError(
                    f"the divergence could not be integrated to {tolerance:g} nats with {self.max_intervals} intervals. "
                    "Raise max_intervals or the tolerance, tighten the solver, or use smooth activations."
                )
            known |= self._evaluated(along, coarse, evaluate)
            pieces = sorted(known)
            errors = torch.stack([self._error(piece, known[piece], along) for piece in pieces])
            total = errors.sum(dim=0)
            # If the sum exceeds the tolerance, at least one interval exceeds an equal share of it.
            too_coarse = ((errors > tolerance / len(pieces)) & (total > tolerance)).any(dim=1)
            at_nodes = AtNodes.cat([known[piece] for piece in pieces])
            missed = (
                unseen(self._rule(pieces, along.x), at_nodes, along, _MISSED).amax() if along.x.numel() else total.sum()
            )
            facts = torch.stack([total.isfinite().all().to(missed), missed])
            finite, missed, *chosen = torch.cat([facts, too_coarse.to(missed)]).tolist()  # the host waits once
            if not finite:
                raise SolverError(
                    "the divergence along the trajectory is not finite, so it can't be integrated. Look for derivatives that "
                    "are infinite, such as that of a square root at zero."
                )
            steps = [along.steps(piece.low, piece.high) / piece.nodes for piece in pieces]
            # The solver's own error remains, whatever nodes are added.
            if missed > tolerance and not any(chosen) and (missed < before / 2 or math.isinf(missed)):
                chosen[steps.index(max(steps))], before = True, missed
            coarse = {}
            for piece, for_error, crowd in zip(
                pieces, chosen, steps, strict=True
            ):  # in time's order, as they are solved
                if not for_error and crowd <= 1:
                    continue
                values = known.pop(piece)
                for finer in piece.finer(self._counts):
                    coarse[finer] = values if finer.nodes > piece.nodes else None
        return pieces, at_nodes

    def _evaluated(
        self, along: Along, coarse: dict[Piece, AtNodes | None], evaluate: Callable[[Tensor, Tensor], AtNodes]
    ) -> dict[Piece, AtNodes]:
        """What is known at the nodes of some intervals, in order of time; every second node may be known before."""
        new = []
        for piece, before in coarse.items():
            nodes = self._rule([piece], along.x).nodes
            new.append(nodes if before is None else nodes[::2])
        nodes = torch.cat(new)
        at_nodes, done, found = evaluate(nodes, along.states(nodes)), 0, {}
        for (piece, before), own in zip(coarse.items(), new, strict=True):
            part = at_nodes.part(slice(done, done + len(own)))
            found[piece] = part if before is None else before.between(part)
            done += len(own)
        return found

    def _error(self, piece: Piece, at_nodes: AtNodes, along: Along) -> Float[Tensor, " batch"]:
        return _disagreement(self._rule([piece], along.x), at_nodes.divergence, along)


def _disagreement(rule: Rule, divergences: Tensor, along: Along) -> Float[Tensor, " batch"]:
    speed = along.speed(rule.nodes).detach()
    return weighted_sum((rule.weights - rule.lesser) * speed, divergences.detach()).abs()


def _standard_error(rule: Rule, at_nodes: AtNodes, speed: Tensor, frozen: bool) -> Float[Tensor, " batch"] | None:
    """The standard error of the log-determinant.

    Independent samples are integrated first, because the errors of one of them at different nodes need not be independent.
    If each node only knows its own error, the errors count as independent; those of one draw of random vectors for all
    nodes count as equal, which bounds the error.
    """
    weights = speed.detach() * rule.weights
    if at_nodes.samples is not None:
        return standard_error_of_mean(weighted_sum(weights, at_nodes.samples.detach()))
    if at_nodes.standard_error is None:
        return None
    weights = weights.abs()
    if frozen:
        return weighted_sum(weights, at_nodes.standard_error)
    return weighted_sum(weights.square(), at_nodes.standard_error.square()).sqrt()

"""Whether the nodes of a quadrature resolve what the solver saw, tested on the velocity, whose integral is known."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.likelihood.along import Along, AtNodes
from divflow.likelihood.pieces import Rule
from divflow.operators.field import flatten_event

__all__ = ["unseen", "weighted_sum"]

# The fraction of the way that counts as the error of a method that does not follow a tolerance.
_OF_FIXED_STEPS = 0.1
_SAFETY = 2.0


@torch.no_grad()
def unseen(rule: Rule, at_nodes: AtNodes, along: Along, ignored: float = 0.0) -> Float[Tensor, " batch"]:
    """Estimate what nodes may miss of the divergence's integral, in nats, from the fraction of the velocity's that they miss.

        |x(end) - x(start) - sum_i w_i v(t_i, x_i)|   over   sum_i |w_i v(t_i, x_i)|

    Two rules that agree may both have overlooked a layer or an oscillation, but the integral of the velocity is known. The
    result is zero up to the solver's own error, and infinite if the nodes see nothing of what happens. It costs no
    evaluation.

    Args:
        rule: of the nodes.
        at_nodes: what is known there.
        along: the trajectory.
        ignored: a fraction of the way that may be missed.
    """
    weights = rule.weights * along.speed(rule.nodes)
    seen = weighted_sum(weights, at_nodes.velocity)
    missed = (flatten_event(along.final - along.x).T - seen).norm(dim=0)
    length = weighted_sum(weights.abs(), at_nodes.velocity.norm(dim=0))
    ignored = ignored if along.solver.adaptive else max(ignored, _OF_FIXED_STEPS)
    own = torch.maximum(along.allowance(), ignored * length) if along.solver.adaptive else ignored * length
    missed = missed - own
    integral = weighted_sum(weights.abs(), at_nodes.divergence.abs())
    # The missed part of the state, relative to its size, if it changes at the rates of its volume.
    change = (missed / length * integral / max(1, len(at_nodes.velocity))).nan_to_num(nan=math.inf)
    change = torch.where(change < 1, _SAFETY * change / (1 - change), math.inf) * len(at_nodes.velocity)
    return torch.where(missed > 0, change, 0.0).to(at_nodes.divergence)


def weighted_sum(
    weights: Float[Tensor, " nodes"], values: Float[Tensor, "*some nodes batch"]
) -> Float[Tensor, "*some batch"]:
    """Sum over nodes; not a matrix product, which autocast would round to half precision.

    Args:
        weights: of the nodes.
        values: at the nodes.
    """
    return (weights[:, None].to(values) * values).sum(dim=-2)

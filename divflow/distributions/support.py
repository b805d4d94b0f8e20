"""Log-densities of torch's distributions, sample by sample: -inf outside of a support, whatever the other samples are.

Torch itself refuses a batch if one sample lies outside or, without validation, returns some number for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
    transform_to,
)
from torch.distributions.constraints import Constraint
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

__all__ = ["log_density", "without_volume"]

# Sets without inner points: a density on them is not one over all entries of an event.
_THIN = (
    constraints.simplex,
    constraints.corr_cholesky,
    constraints.lower_cholesky,
    constraints.lower_triangular,
    constraints.symmetric,
    constraints.positive_semidefinite,
    constraints.positive_definite,
)


def log_density(distribution: Distribution, value: Tensor) -> Tensor:
    """Compute the log-density of values in nats, `(*sample, *batch)`; -inf outside of the support.

    It descends into the parts of a distribution, because only the parts know a support that depends on parameters (that of
    a mixture of uniforms, or of an affine map of one). The parts must not validate. Gradients of other samples stay
    finite, because a value outside is never evaluated.

    Args:
        distribution: any of torch's.
        value: `(*sample, *batch, *event)`.
    """
    kind = type(distribution).log_prob
    if isinstance(distribution, Independent) and kind is Independent.log_prob:
        return _summed(log_density(distribution.base_dist, value), distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, MixtureSameFamily) and kind is MixtureSameFamily.log_prob:
        padded = value.unsqueeze(-1 - len(distribution.event_shape))
        parts = log_density(distribution.component_distribution, padded)
        beyond = parts.isneginf().all(dim=-1)  # the derivative of logsumexp is NaN there
        parts = torch.where(beyond[..., None], 0.0, parts) + distribution.mixture_distribution.logits.log_softmax(
            dim=-1
        )
        return torch.where(beyond, -torch.inf, parts.logsumexp(dim=-1))
    if isinstance(distribution, TransformedDistribution) and kind is TransformedDistribution.log_prob:
        return _transformed(distribution, value)
    return _inside(_support(distribution), value, distribution.log_prob)


def without_volume(distribution: Distribution) -> str | None:
    """Explain why a distribution has no density over all entries of its events; None if it has one.

    Args:
        distribution: any of torch's.
    """
    if isinstance(distribution, ExpRelaxedCategorical):
        return "lies on a surface"  # torch declares the whole space as its support
    if isinstance(distribution, Independent):
        return without_volume(distribution.base_dist)
    if isinstance(distribution, MixtureSameFamily):
        return without_volume(distribution.component_distribution)
    support = _support(distribution)
    while support is not None and not constraints.is_dependent(support):
        if support.is_discrete:
            return "is discrete"
        if any(isinstance(support, type(thin)) for thin in _THIN):
            return "lies on a surface"
        support = getattr(support, "base_constraint", None)
    if isinstance(distribution, TransformedDistribution):
        reason = without_volume(distribution.base_dist)
        # A transform, such as the inverse of stick-breaking, may map a surface to a whole space of fewer dimensions.
        opened = distribution.event_shape != distribution.base_dist.event_shape
        return None if opened and reason != "is discrete" else reason
    return None


def _transformed(distribution: TransformedDistribution, value: Tensor) -> Tensor:
    """As torch computes it, transform by transform, without asking one about values that it can't have produced."""

    def density(y: Tensor) -> Tensor:
        dims = len(distribution.event_shape)
        total, missing = y.new_zeros(()), _any(y.isnan(), dims)
        beyond = torch.zeros_like(missing)
        for transform in reversed(distribution.transforms):
            domain, codomain = transform.domain, transform.codomain
            outside, y = _moved_inside(codomain, y)
            if outside is not None:
                beyond = beyond | _any(outside, dims - codomain.event_dim)
            x = transform.inv(y)
            dims += domain.event_dim - codomain.event_dim
            total = total - _summed(transform.log_abs_det_jacobian(x, y), dims - domain.event_dim)
            y = x
        total = total + _summed(log_density(distribution.base_dist, y), dims - len(distribution.base_dist.event_shape))
        return torch.where(missing, torch.nan, torch.where(beyond, -torch.inf, total))

    return _inside(_support(distribution), value, density)


def _inside(support: Constraint | None, value: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
    outside, point = _moved_inside(support, value)
    if support is None or outside is None:
        return log_prob(value)
    found = torch.where(outside, -torch.inf, log_prob(point))
    return torch.where(_any(value.isnan(), support.event_dim), torch.nan, found)


def _moved_inside(support: Constraint | None, value: Tensor) -> tuple[Tensor | None, Tensor]:
    """Which values lie outside, `(*sample, *batch)`, or None if none can; and the values, moved inside where necessary."""
    if support is None or constraints.is_dependent(support) or _unbounded(support):
        return None, value
    outside = ~support.check(value)
    try:
        within = transform_to(support)(torch.zeros_like(value))
    except NotImplementedError:  # torch knows no map to the support
        return outside, value
    return outside, torch.where(outside.reshape(*outside.shape, *[1] * support.event_dim), within, value)


def _support(distribution: Distribution) -> Constraint | None:
    try:
        support = distribution.support
    except (NotImplementedError, AttributeError):  # a user's distribution without a support
        return None
    return support if isinstance(support, Constraint) else None


def _unbounded(support: Constraint) -> bool:
    while isinstance(support, type(constraints.real_vector)):  # `independent` of another
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def _summed(values: Tensor, dims: int) -> Tensor:
    return values.sum(dim=tuple(range(-dims, 0))) if dims else values


def _any(values: Tensor, dims: int) -> Tensor:
    return values.flatten(-dims).any(dim=-1) if dims else values

"""A flow as a `torch.distributions.Distribution`, and Kullback-Leibler divergences by Monte Carlo."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.utils._pytree import tree_flatten

from divflow.divergence import FieldError
from divflow.errors import DivflowError, check_count
from divflow.flow.evaluation import Flow
from divflow.operators.context import Context, mapped, named_tensors
from divflow.operators.field import checked_state

__all__ = [
    "KL_SAMPLES",
    "ClosedFormError",
    "ContextDim",
    "FlowDistribution",
    "MonteCarloKL",
    "estimate_kl",
    "flow_distribution",
]

ContextDim = Any
"""A number of dimensions, or a tree of them."""

KL_SAMPLES = 1_000
"""Samples that `torch.distributions.kl_divergence` takes, which has no argument for their number."""


class ClosedFormError(DivflowError, NotImplementedError):
    """A flow has no closed form of this property; the message says how to estimate it."""


class FlowDistribution(Distribution):
    """A flow as a torch distribution, given a context or none; `ContinuousFlow.distribution` makes it.

        log p(x | c) = log p_base(z) - integral from t_base to t_data of (div v)(t, x_t, c) dt        in nats

    It serves wherever torch expects a distribution: inside `TransformedDistribution` and `Independent`, as a base of other
    libraries' flows, and in Pyro's models and guides. Samples are reparameterised: gradients reach the velocity's parameters
    and the context. Randomness comes from torch's default generator.

    Args:
        flow: whose parameters are shared, not copied.
        context: `(*batch, *one)`, one context or a batch of them, whose batch shape the distribution takes; or a tree of
            such tensors (dict, tuple, list), all of one batch shape; None for a flow without.
        context_dim: number of dimensions of one context: 1 for a vector, 0 for a label, 3 for an image. For a tree it is
            one number for all tensors, or a tree of numbers, `{"label": 0, "image": 3}`.
        validate_args: whether contexts and values are checked, as torch does; torch's default if None.

    Raises:
        FieldError: a context that is not a tensor or tree of tensors, or has fewer than `context_dim` dimensions; tensors
            of several batch shapes.
        ValueError: with `validate_args`, contexts that are not finite; in `log_prob`, values of another shape or outside
            the reals.

    Example:
        >>> from divflow.flow import ContinuousFlow
        >>> flow = ContinuousFlow(lambda t, x: -x, 2)
        >>> flow.distribution().sample((3,)).shape
        torch.Size([3, 2])
    """

    has_rsample = True

    def __init__(
        self,
        flow: Flow,
        context: Context | None = None,
        context_dim: ContextDim = 1,
        validate_args: bool | None = None,
    ) -> None:
        self.flow, self.context, self.context_dim = flow, context, context_dim
        self._dims = _dims(context, context_dim)
        super().__init__(_batch_shape(context, self._dims), flow.event_shape, validate_args)
        if self._validate_args and not isinstance(context, Tensor):
            for place, leaf in named_tensors(context):
                if not leaf.isfinite().all():
                    raise ValueError(f"{place} must be finite, but is not: {leaf}")

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """Contexts that are tensors are real numbers."""
        if not isinstance(self.context, Tensor):
            return {}
        return {"context": constraints.independent(constraints.real, self._dims[0])}

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All events of real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> "FlowDistribution":
        """Return the same distribution for a larger batch, without copying the contexts.

        Raises:
            RuntimeError: the batch shape does not expand to this one.
        """
        shape = torch.empty(self.batch_shape, device="meta").expand(Size(batch_shape)).shape
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.context, new.context_dim = self.flow, self.context, self.context_dim
        own = len(self.batch_shape)
        new._dims, new.context = self._dims, mapped(lambda leaf: leaf.expand(shape + leaf.shape[own:]), self.context)
        Distribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log-density of values `(*sample, *batch, *event)` in nats, `(*sample, *batch)`.

        Raises:
            ValueError: with `validate_args`, a value of another shape, or one that is not finite.
            FieldError: as `ContinuousFlow.log_prob`.
            SolverError: as `ContinuousFlow.log_prob`.
        """
        if self._validate_args and not (isinstance(value, Tensor) and value.numel() == 0):  # torch can't reshape it
            self._validate_sample(value)
        value = checked_state(value) if not isinstance(value, Tensor) or value.ndim else value
        batch_ndim = value.ndim - len(self.event_shape)
        event = value.shape[batch_ndim:]  # the flow refuses another shape
        shape = torch.broadcast_shapes(value.shape[:batch_ndim], self.batch_shape)
        rows = value.expand(shape + event).reshape(shape.numel(), *event)
        return self.flow.log_prob(rows, self._contexts(shape)).view(shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples `(*sample_shape, *batch, *event)`, differentiable in the parameters and the context."""
        shape = Size(sample_shape) + self.batch_shape
        # The base has no parameters, so its samples are noise, whatever their distribution.
        z = self.flow.sample_base(shape.numel())
        return self.flow.decode(z, self._contexts(shape)).view(shape + self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw samples as `rsample` with their log-densities `(*sample_shape, *batch)` in nats, from one solve."""
        shape = Size(sample_shape) + self.batch_shape
        x, log_prob = self.flow.rsample_and_log_prob(shape.numel(), self._contexts(shape))
        return x.view(shape + self.event_shape), log_prob.view(shape)

    @property
    def mean(self) -> Tensor:
        """The mean has no closed form."""
        raise _no_closed_form("mean", "d.sample((1000,)).mean(dim=0)")

    @property
    def variance(self) -> Tensor:
        """The variance has no closed form, nor has `stddev`."""
        raise _no_closed_form("variance", "d.sample((1000,)).var(dim=0)")

    @property
    def mode(self) -> Tensor:
        """The mode has no closed form."""
        raise _no_closed_form("mode", "the sample of the largest d.log_prob, then gradient ascent from there")

    def entropy(self) -> Tensor:
        """The entropy has no closed form, nor has `perplexity`."""
        raise _no_closed_form("entropy", "-d.rsample_and_log_prob((1000,))[1].mean(dim=0)")

    def cdf(self, value: Tensor) -> Tensor:
        """The distribution function has no closed form."""
        raise _no_closed_form(
            "cumulative distribution function", "the mean of (d.sample((1000,)) <= value).all(dim=-1)"
        )

    def icdf(self, value: Tensor) -> Tensor:
        """The quantiles have no closed form."""
        raise _no_closed_form("quantiles", "d.sample((1000,)).quantile(value, dim=0), for each entry by itself")

    def _contexts(self, shape: Size) -> Context | None:
        """One row per sample, for samples of `shape`, which ends in the batch shape."""
        own = len(self.batch_shape)

        def rows(leaf: Tensor) -> Tensor:
            return leaf.expand(shape + leaf.shape[own:]).reshape(shape.numel(), *leaf.shape[own:])

        return mapped(rows, self.context)


def _dims(context: Context | None, dim: ContextDim) -> list[int]:
    """The number of dimensions of one context, for each tensor.

    Raises:
        FieldError: a tree of numbers of another structure than the context's.
        ValueError: a value that is not such a number.
    """
    places = [place for place, _ in named_tensors(context)]
    if isinstance(dim, int):
        dims = [dim] * len(places)
    else:
        dims, tree = tree_flatten(dim)
        if tree != tree_flatten(context)[1]:
            raise FieldError(
                f"context_dim must be a number or a tree of numbers like the context ({', '.join(places) or 'none'}), but is {dim!r}"
            )
    dims = [number for number in dims if number is not None]  # the context has None there, too
    for number in dims:
        check_count("context_dim", number, least=0)
    return dims


def _batch_shape(context: Context | None, dims: list[int]) -> Size:
    """The batch shape that all tensors of a context have.

    Raises:
        FieldError: they have several, or fewer dimensions.
    """
    shapes: dict[Size, str] = {}
    for (place, leaf), dim in zip(named_tensors(context), dims, strict=True):
        if leaf.ndim < dim:
            raise FieldError(
                f"{place} must hold one context of {dim} dimensions, or a batch of them, but has shape "
                f"{tuple(leaf.shape)}. Set context_dim to the number of dimensions of one context."
            )
        shapes.setdefault(leaf.shape[: leaf.ndim - dim], place)
    if len(shapes) > 1:
        found = ", ".join(f"{place} {tuple(shape)}" for shape, place in shapes.items())
        raise FieldError(
            f"the tensors of a context must have one batch shape, but have {found}. Set context_dim to the dimensions of one context."
        )
    return next(iter(shapes), Size())


def _no_closed_form(what: str, remedy: str) -> ClosedFormError:
    return ClosedFormError(f"a flow has no closed form of its {what}. To estimate it by samples, take {remedy}.")


def flow_distribution(flow: Flow, context: Context | None = None, context_dim: ContextDim = 1) -> FlowDistribution:
    """Make the `FlowDistribution` of a flow.

    If Pyro is imported, the result is also one of Pyro's, for `pyro.sample`, plates and inference.

    Args:
        flow: the flow.
        context: one context or a batch of them, or None.
        context_dim: number of dimensions of one context.
    """
    return (_pyro_class() if "pyro" in sys.modules else FlowDistribution)(flow, context, context_dim)


@functools.cache
def _pyro_class() -> type[FlowDistribution]:
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    return type("FlowDistribution", (FlowDistribution, TorchDistributionMixin), {})


class MonteCarloKL(NamedTuple):
    """An estimated Kullback-Leibler divergence, and its error.

    Attributes:
        value: the mean of log p(x) - log q(x) over samples x of p, in nats, of the common batch shape of p and q.
        standard_error: of that mean, in nats.
    """

    value: Tensor
    standard_error: Tensor


def estimate_kl(p: Distribution, q: Distribution, num_samples: int = KL_SAMPLES) -> MonteCarloKL:
    """Estimate a Kullback-Leibler divergence from samples of p: unbiased, with its standard error.

        KL(p || q) = E_p[log p(x) - log q(x)]        in nats

    One of the two is usually a flow; if p is, samples and log-densities come from one solve. Torch's `kl_divergence(p, q)`
    gives this value for 1,000 samples (`KL_SAMPLES`) if p or q is a `FlowDistribution`. The value is differentiable in the
    parameters of q, and of p if its samples are reparameterised.

    Args:
        p: the distribution that is sampled.
        q: the other, of the same event shape; the batch shapes broadcast.
        num_samples: from each distribution of the batch; at least 2, because one has no standard error.

    Raises:
        ValueError: event shapes that differ, fewer than 2 samples, or gradients in p's parameters if its samples are not
            reparameterised.
    """
    check_count("num_samples", num_samples, least=2)
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"p and q must have the same event shape, but p's is {tuple(p.event_shape)} and q's {tuple(q.event_shape)}"
        )
    p = p.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
    if isinstance(p, FlowDistribution):
        x, log_p = p.rsample_and_log_prob((num_samples,))
    else:
        x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
        log_p = p.log_prob(x)
    if log_p.requires_grad and not p.has_rsample:
        raise ValueError(
            f"the samples of {type(p).__name__} are not reparameterised, so the gradient in its parameters would be "
            "wrong. Detach the parameters, or use torch.no_grad()."
        )
    difference = log_p - q.log_prob(x)
    return MonteCarloKL(difference.mean(dim=0), difference.std(dim=0) / num_samples**0.5)


@register_kl(FlowDistribution, FlowDistribution)
@register_kl(FlowDistribution, Distribution)
@register_kl(Distribution, FlowDistribution)
def _kl(p: Distribution, q: Distribution) -> Tensor:
    return estimate_kl(p, q).value

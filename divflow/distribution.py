"""A flow as a `torch.distributions.Distribution`, and Kullback-Leibler divergences by Monte Carlo."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, register_kl

from divflow.arguments import check_count
from divflow.divergence import FieldError
from divflow.divergence.field import checked_state

if TYPE_CHECKING:
    from divflow.flow import ContinuousFlow

__all__ = ["KL_SAMPLES", "FlowDistribution", "MonteCarloKL", "estimate_kl"]

KL_SAMPLES = 1_000
"""How many samples `torch.distributions.kl_divergence` takes, which has no argument for it."""


class FlowDistribution(Distribution):
    """The density at a flow's t_data, given a context or none; `ContinuousFlow.distribution` makes it.

        log p(x | c) = log p_base(z) - integral from t_base to t_data of (div v)(t, x_t, c) dt        in nats

    It stands wherever torch asks for a distribution: within `TransformedDistribution` and `Independent`, and as a base
    of other libraries' flows. Samples are reparameterised: gradients reach the velocity's parameters and the context.
    Randomness is torch's default generator's.

    Args:
        flow: whose parameters are shared, not copied.
        context: `(*batch, *one)`, one context or a batch of them, the batch shape being theirs; None for a flow
            without.
        context_dim: number of dimensions of one context: 1 for a vector, 0 for a label, 3 for an image.
        validate_args: whether contexts and values are checked, as torch does; its own default if None.

    Raises:
        FieldError: a context that is no tensor, or of fewer than `context_dim` dimensions.
        ValueError: with `validate_args`, contexts that are not finite; in `log_prob`, values of another shape or
            outside the reals.

    Example:
        >>> from divflow.flow import ContinuousFlow
        >>> flow = ContinuousFlow(lambda t, x: -x, 2)
        >>> flow.distribution().sample((3,)).shape
        torch.Size([3, 2])
    """

    has_rsample = True

    def __init__(
        self,
        flow: "ContinuousFlow",
        context: Tensor | None = None,
        context_dim: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        check_count("context_dim", context_dim, least=0)
        if context is not None and (not isinstance(context, Tensor) or context.ndim < context_dim):
            what = f"has shape {tuple(context.shape)}" if isinstance(context, Tensor) else f"is {context!r}"
            raise FieldError(
                f"the context must be a tensor of one context, of {context_dim} dimensions, or a batch of them, but "
                f"{what}; context_dim says how many dimensions one has"
            )
        self.flow, self.context, self.context_dim = flow, context, context_dim
        batch = Size() if context is None else context.shape[: context.ndim - context_dim]
        super().__init__(batch, flow.event_shape, validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """Contexts are real numbers."""
        return {} if self.context is None else {"context": constraints.independent(constraints.real, self.context_dim)}

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All events of real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> "FlowDistribution":
        """The same distribution for a larger batch, without copying the contexts.

        Raises:
            RuntimeError: the batch shape does not expand to this one.
        """
        shape = torch.empty(self.batch_shape, device="meta").expand(Size(batch_shape)).shape
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.context, new.context_dim = self.flow, self.context, self.context_dim
        if self.context is not None:
            new.context = self.context.expand(shape + self.context.shape[len(self.batch_shape) :])
        Distribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of values `(*sample, *batch, *event)` in nats, `(*sample, *batch)`.

        Raises:
            ValueError: with `validate_args`, a value of another shape, or one that is not finite.
            FieldError, SolverError: as `ContinuousFlow.log_prob`.
        """
        if self._validate_args and not (isinstance(value, Tensor) and value.numel() == 0):  # which torch can't reshape
            self._validate_sample(value)
        value = checked_state(value) if not isinstance(value, Tensor) or value.ndim else value
        batch_ndim = value.ndim - len(self.event_shape)
        event = value.shape[batch_ndim:]  # which the flow refuses where it is another one
        shape = torch.broadcast_shapes(value.shape[:batch_ndim], self.batch_shape)
        rows = value.expand(shape + event).reshape(shape.numel(), *event)
        return self.flow.log_prob(rows, self._contexts(shape)).view(shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples `(*sample_shape, *batch, *event)`, differentiable in the parameters and the context."""
        shape = Size(sample_shape) + self.batch_shape
        # The base has no parameters, so that its samples are noise, whatever their distribution.
        z = self.flow.sample_base(shape.numel())
        return self.flow.decode(z, self._contexts(shape)).view(shape + self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Samples as of `rsample` with their log-densities `(*sample_shape, *batch)` in nats, from one solve."""
        shape = Size(sample_shape) + self.batch_shape
        x, log_prob = self.flow.rsample_and_log_prob(shape.numel(), self._contexts(shape))
        return x.view(shape + self.event_shape), log_prob.view(shape)

    def _contexts(self, shape: Size) -> Tensor | None:
        """One row a sample, for samples of `shape`, which ends in the batch shape."""
        if self.context is None:
            return None
        one = self.context.shape[len(self.batch_shape) :]
        return self.context.expand(shape + one).reshape(shape.numel(), *one)


class MonteCarloKL(NamedTuple):
    """An estimated Kullback-Leibler divergence, and its error.

    Attributes:
        value: the mean of log p(x) - log q(x) over samples x of p, in nats, of p's and q's common batch shape.
        standard_error: of that mean, in nats.
    """

    value: Tensor
    standard_error: Tensor


def estimate_kl(p: Distribution, q: Distribution, num_samples: int = KL_SAMPLES) -> MonteCarloKL:
    """KL(p || q) = E_p[log p(x) - log q(x)], by samples of p: unbiased, with its standard error.

    One of the two is usually a flow; where it is p, samples and log-densities come from one solve. `kl_divergence(p, q)`
    of torch gives its value for 1,000 samples (`KL_SAMPLES`) where p or q is a `FlowDistribution`. The value is
    differentiable in the parameters of p, where p's samples are reparameterised, and of q.

    Args:
        p: the distribution that is sampled.
        q: the other, of the same event shape; the batch shapes broadcast.
        num_samples: from each distribution of the batch; at least 2, since one has no standard error.

    Raises:
        ValueError: event shapes that differ, fewer than 2 samples, or gradients in p's parameters that samples without
            reparameterisation don't have.
    """
    check_count("num_samples", num_samples, least=2)
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"p and q must have one event shape, but p's is {tuple(p.event_shape)} and q's {tuple(q.event_shape)}"
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
            "wrong; detach them, or use torch.no_grad()"
        )
    difference = log_p - q.log_prob(x)
    return MonteCarloKL(difference.mean(dim=0), difference.std(dim=0) / num_samples**0.5)


@register_kl(FlowDistribution, FlowDistribution)
@register_kl(FlowDistribution, Distribution)
@register_kl(Distribution, FlowDistribution)
def _kl(p: Distribution, q: Distribution) -> Tensor:
    return estimate_kl(p, q).value

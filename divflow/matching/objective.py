"""Conditional flow matching: a velocity is fitted to those of paths from noise to data."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor

from divflow.divergence import FieldError, check_field
from divflow.divergence.check import check_sample_times
from divflow.likelihood import ConditionedField
from divflow.matching.coupling import Coupling, IndependentCoupling
from divflow.matching.path import LinearPath, Path
from divflow.matching.times import Times, UniformTimes, check_times
from divflow.operators.context import Context, check_context
from divflow.operators.field import accumulation_dtype, as_time, checked_state, flatten_event

__all__ = ["ConditionalFlowMatching"]

_LINEAR, _INDEPENDENT, _UNIFORM = LinearPath(), IndependentCoupling(), UniformTimes()


@dataclass(frozen=True)
class ConditionalFlowMatching:
    """Train a velocity by regression on those of paths from noise to data, without solving an ODE.

        loss of a sample = 1 / D * sum over entries i of (v(t, x_t)_i - (dx_t/dt)_i)^2

    (Lipman et al. 2023, arXiv:2210.02747, equation 9; Tong et al. 2024). It is a mean, not a sum, over the D entries of the
    event, so its mean over a batch is that over all entries: the loss of the packages flow_matching and torchcfm. Nothing
    is differentiated in x.

    The minimiser is the mean of the paths' velocities at each t and x. Its flow has the density of x_t at each t: that of
    the data at t = 1. The loss at the minimum is the variance of those velocities, not zero, so it says little about the
    density. Evaluate by likelihood.

    Args:
        path: from noise to data.
        coupling: of noise and data.
        times: the density from which t is drawn; it is not divided out, so it weights the times.

    Raises:
        ValueError: an argument of another class.

    Example:
        >>> import torch
        >>> x = torch.randn(8, 2)
        >>> ConditionalFlowMatching()(lambda t, x: -x, x).shape
        torch.Size([8])
    """

    path: Path = _LINEAR
    coupling: Coupling = _INDEPENDENT
    times: Times = _UNIFORM

    def __post_init__(self) -> None:
        for name, kind in (("path", Path), ("coupling", Coupling), ("times", Times)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be an instance of {kind.__name__}, but is {getattr(self, name)!r}")

    def __call__(
        self,
        velocity: Callable[..., Tensor],
        x: Tensor,
        generator: Generator | None = None,
        *,
        context: Context | None = None,
        t: Tensor | float | None = None,
        noise: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Compute the losses of a batch, `(k,)`, differentiable in the velocity's parameters.

        Args:
            velocity: `v(t, x)`, or `v(t, x, context)` with a context, of x's shape; t is one time per sample, `(k,)`.
            x: data `(k, *event)`, of a floating dtype.
            generator: of noise and times; torch's default one if None.
            context: a tensor or a tree of tensors, one row per sample, `(k, ...)`.
            t: times in [0, 1], a scalar or one per sample; drawn if None.
            noise: of the flow's base density, `(k, *event)`, before the coupling; standard normal if None.
            weight: with which the caller averages the losses, `(k,)`, or None. It does not multiply them. Rows are coupled only
                with noise of rows of the same weight, as of the same context: other noise would get its datum's weight, and
                would no longer follow the base.

        Raises:
            FieldError: x, t, the noise, the context or the velocity's value has a wrong type, shape, dtype or device.
            MatchingError: t outside [0, 1], or rows that optimal transport can't pair.
        """
        x = checked_state(x)
        noise = self.path.noise(x, generator) if noise is None else _checked_noise(noise, x)
        if t is None:
            t = self.times.draw(x, generator)
        else:
            t = as_time(t, x).expand(len(x))
            check_times(t)
        check_context(context, x)
        alike = context if weight is None else (context, weight)
        point = self.path(t, self.coupling(noise, x, alike), x)
        error = ConditionedField(velocity, context)(t.clone(), point.x.clone()) - point.velocity
        entries = flatten_event(error).to(accumulation_dtype(error))
        return entries.square().sum(dim=1) / max(1, entries.shape[1])

    def check(self, velocity: Callable[..., Tensor], x: Tensor, context: Context | None = None) -> None:
        """Refuse a velocity that mixes the samples of a batch, or takes only scalar times; call it once before training.

        Args:
            velocity: as in a call.
            x: data `(k, *event)`.
            context: a tensor or a tree of tensors, one row per sample.

        Raises:
            FieldError: with the fault and the remedy.
        """
        x = checked_state(x)
        check_context(context, x)
        field = ConditionedField(velocity, context)
        check_field(field, 0.5, x, gradient=True)
        if len(x) == 1:  # a velocity of scalar times also takes the one time of one sample
            field, x = field.repeat(2), x.repeat(2, *[1] * (x.ndim - 1))
        if len(x):
            check_sample_times(field, 0.0, 1.0, x, "flow matching draws a time for each sample, but the velocity")


def _checked_noise(noise: Tensor, x: Tensor) -> Tensor:
    if noise.shape != x.shape or noise.dtype != x.dtype or noise.device != x.device:
        raise FieldError(
            f"the noise must have x's shape, dtype and device, {tuple(x.shape)}, {x.dtype} and {x.device}, but has "
            f"{tuple(noise.shape)}, {noise.dtype} and {noise.device}"
        )
    return noise

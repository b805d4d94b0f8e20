"""What tasks train and `divflow.load` returns: densities of data, through the preprocessing of the data."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar, cast

import torch
from torch import Generator, Tensor, nn

from divflow.divergence.field import Field, FieldError
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow, FlowEvaluation
from divflow.importance import ImportanceWeights
from divflow.rows import check_finite_rows, checked_rows
from divflow.score.field import AtTime, Score, as_field, tensor_settings
from divflow.score.probability_flow import ProbabilityFlow
from divflow.score.sampling import ProbabilityFlowODE, Sampler
from divflow.score.sde import SDE
from divflow.transforms import Affine, Transform
from divflow.units import warn_of_far_data

__all__ = ["FlowDensity", "ScoreDensity", "UnnormalizedDensity", "in_units"]

_Density = TypeVar("_Density", bound="FlowDensity")


class FlowDensity(nn.Module):
    """The density of data x whose transform y = T(x) a flow models; what `divflow.load` returns.

        log p(x | c) = log p_flow(T(x) | S(c)) + log |det dT/dx|      x = T^-1(y), y from the flow

    Args:
        flow: of the transformed data.
        transform: T, from the data, with its log-determinant.
        context_transform: S, the standardization of contexts, entry by entry; None if the flow takes them as they are, or none.

    Attributes:
        columns: the names of the data's columns, where it was loaded back and these have names; else None.
        watch_units: whether `evaluate` with diagnostics warns of data that are farther from the base than the model's own samples, as
            it does where the density was loaded back: what is being trained is far from its data at first.
    """

    columns: list[str] | None = None
    watch_units: bool = False

    def __init__(self, flow: ContinuousFlow, transform: Transform, context_transform: Affine | None = None) -> None:
        super().__init__()
        self.flow, self.transform, self.context_transform = flow, transform, context_transform

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the flow computes in."""
        return _dtype(self.flow)

    @property
    def data_range(self) -> tuple[Tensor, Tensor] | None:
        """The least and the largest data that it takes, which broadcast to the event; None where no bounds are known.

        Those of its transform, or those that an adapted model was trained on, in the units of the data.
        """
        ends, model = self.transform.data_range, getattr(self.flow, "data_range", None)
        if ends is not None or model is None or not isinstance(self.transform, Affine):
            return ends
        low, high = (end * self.transform.scale + self.transform.shift for end in model)
        return torch.minimum(low, high), torch.maximum(low, high)

    def extra_repr(self) -> str:
        """The range of the data, if it is known."""
        ends = self.data_range
        return "" if ends is None else f"data_range=({ends[0].min().item():g}, {ends[1].max().item():g})"

    def log_prob(self, x: Tensor, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """The log-density of data x `(k, *event)` in nats, `(k,)`."""
        return self.evaluate(x, context, generator, diagnostics=False).log_prob

    def evaluate(
        self,
        x: Tensor,
        context: Tensor | None = None,
        generator: Generator | None = None,
        *,
        diagnostics: bool = True,
        penalties: Collection[str] = (),
    ) -> FlowEvaluation:
        """`ContinuousFlow.evaluate` of the transformed data, with the transform's log-determinant added.

        Args:
            x: data `(k, *event)`.
            context: one row a sample, in its own units.
            generator: of a stochastic estimator's probes.
            diagnostics: estimate the errors even where that takes further evaluations.
            penalties: integrals to take along the trajectory, as `ContinuousFlow.evaluate`.

        Raises:
            FieldError: x is no floating-point tensor `(k, *event)`, or has rows that are not finite or out of the range that the
                density takes.
        """
        x, flow_context = checked_rows(x, self.flow.event_shape), self.flow_context(context)
        try:
            y, log_det = self.transform(x, values=False)
            y, log_det = y.to(self.dtype), log_det.to(self.dtype)
            result = self.flow.evaluate(y, flow_context, generator, diagnostics=diagnostics, penalties=penalties)
        except DivflowError:  # values are read where they failed alone, lest a training step waits for its device
            self.transform.check_values(x)
            if context is not None:
                check_finite_rows(context, "the context")
            raise
        if self.watch_units and diagnostics:
            warn_of_far_data(self.flow.base, result.latent)
        return result._replace(log_prob=result.log_prob + log_det, log_det=result.log_det + log_det)

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Samples of the data `(num_samples, *event)` in float64, without gradient; `context` has one row a sample, in its own units.

        Raises:
            FieldError: samples that are not finite in the units of the data.
        """
        return in_units(self.transform, self.flow.sample(num_samples, self.flow_context(context), generator))

    def flow_context(self, context: Tensor | None) -> Tensor | None:
        """A context as the flow takes it, S(c) in its dtype.

        Raises:
            FieldError: it has another number of features.
        """
        if context is None or self.context_transform is None:
            return context
        features, found = tuple(self.context_transform.shift.shape), getattr(context, "shape", None)
        if found is None or tuple(found[1:]) != features:
            what = f"a {type(context).__name__}" if found is None else f"of shape {tuple(found)}"
            raise FieldError(
                f"the context must be a tensor (k, {', '.join(map(str, features))}), a row a sample, but is {what}"
            )
        return self.context_transform(checked_rows(context, name="the context"), values=False)[0].to(self.dtype)

    def importance_weights(
        self,
        log_target: Callable[[Tensor], Tensor],
        num_samples: int,
        generator: Generator | None = None,
        *,
        context: Tensor | None = None,
        correct: bool = False,
        batch_size: int | None = None,
    ) -> ImportanceWeights:
        """Samples of the data weighted towards a target of the data, as `divflow.importance.importance_weights` of the flow.

        Args:
            log_target: of data `(n, *event)` in float64, `(n,)`, in nats; log Z is of its units.
            num_samples: n, at least 2.
            generator: of the samples.
            context: one row a sample, in its own units.
            correct: for half the variance of an estimated log p.
            batch_size: samples a solve, which bounds the memory.
        """

        def of_transformed(y: Tensor) -> Tensor:
            x = in_units(self.transform, y)
            target = log_target(x.clone())
            # What is no value a sample is refused as it is; broadcast, it might look like one.
            fits = isinstance(target, Tensor) and target.shape == (len(x),)
            return target - self.transform(x)[1] if fits else target

        found = self.flow.importance_weights(
            of_transformed,
            num_samples,
            generator,
            context=self.flow_context(context),
            correct=correct,
            batch_size=batch_size,
        )
        return found._replace(samples=in_units(self.transform, found.samples))

    def with_flow(self, flow: ContinuousFlow) -> "FlowDensity":
        """The same density, evaluated by another flow, such as one of another estimator."""
        return self._like_this(FlowDensity(flow, self.transform, self.context_transform))

    def _like_this(self, other: _Density) -> _Density:
        other.columns, other.watch_units = self.columns, self.watch_units
        return other


class ScoreDensity(FlowDensity):
    """The density of data x whose transform y = T(x) a score model over an SDE has: that of its probability flow.

    Args:
        flow: `probability_flow(score, sde)`.
        transform: from the data, with its log-determinant.
        sampler: over the same SDE; `ProbabilityFlowODE` by the flow's solver if None.

    Raises:
        ValueError: a sampler over another SDE.
    """

    def __init__(self, flow: ContinuousFlow, transform: Transform, sampler: Sampler | None = None) -> None:
        super().__init__(flow, transform)
        self.sampler = sampler
        over = getattr(sampler, "sde", None)
        if sampler is not None and over != self.sde:
            raise ValueError(f"the score is over {self.sde}, but the sampler over {over}")

    @property
    def sde(self) -> SDE:
        """Whose marginals the score is of."""
        return cast(ProbabilityFlow, self.flow.velocity).sde

    @property
    def score_field(self) -> Field:
        """The trained score s(t, y) of the transformed data."""
        return cast(ProbabilityFlow, self.flow.velocity).score

    def score(self, x: Tensor) -> Tensor:
        """The score of the data, grad log p(x), `(k, *event)`: the model's at its earliest time, sde.epsilon."""
        checked_rows(x, self.flow.event_shape)
        return _score_of_data(self.score_field, self.sde.epsilon, x, self.transform, self.dtype)

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Samples of the data `(num_samples, *event)` in float64, by the sampler, without gradient; scores take no context."""
        sampler = self.sampler or ProbabilityFlowODE(self.sde, self.flow.solver)
        return in_units(self.transform, sampler(self.score_field, num_samples, generator).samples)

    def with_flow(self, flow: ContinuousFlow) -> "ScoreDensity":
        """The same density, evaluated by another flow, such as one of another estimator."""
        return self._like_this(ScoreDensity(flow, self.transform, self.sampler))


class UnnormalizedDensity(nn.Module):
    """The density of data x whose transform y = T(x) has a known score, and no known normalization: no SDE, no log_prob.

    Args:
        score: `score(t, y)`, or `score(y)`, of the transformed data.
        transform: from the data.
        sampler: `AnnealedLangevin`, of the same levels if there are such; without one `sample` is refused.
        levels: the noise levels that the score was trained at and takes for its time, the least of which stands for
            the data; None for a score of one time, t = 0, whatever step sizes the sampler takes.

    Attributes:
        columns: the names of the data's columns, as of `FlowDensity`.

    Raises:
        ValueError: a sampler of other levels.
    """

    columns: list[str] | None = None

    def __init__(
        self,
        score: Score,
        transform: Transform,
        sampler: Sampler | None = None,
        levels: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.score_field, self.transform, self.sampler = as_field(score), transform, sampler
        self.levels = None if levels is None else tuple(levels)
        taken = getattr(sampler, "sigmas", ())
        if levels is not None and set(taken) - set(levels):
            raise ValueError(f"the score was trained at the levels {self.levels}, but the sampler takes {taken}")

    def score(self, x: Tensor) -> Tensor:
        """The score of the data, grad log p(x), `(k, *event)`."""
        return _score_of_data(self.score_field, min(self.levels or [0.0]), x, self.transform, _dtype(self))

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Samples of the data `(num_samples, *event)` in float64, by the sampler, without gradient; scores take no context.

        Raises:
            ValueError: there is no sampler.
        """
        if self.sampler is None:
            raise ValueError(
                "this score has no sampler: build the UnnormalizedDensity with one, such as AnnealedLangevin(2, [0.5, 0.1])"
            )
        score = AtTime(self.score_field, 0.0) if self.levels is None else self.score_field
        return in_units(self.transform, self.sampler(score, num_samples, generator).samples)


def _score_of_data(score: Field, t: float, x: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
    """grad_x log p(x) = (dT/dx)^T s(t, T(x)) + grad_x log |det dT/dx|."""
    with torch.inference_mode(False), torch.enable_grad():
        transform.check_values(transform.checked(checked_rows(x)))
        x = x.detach().clone().requires_grad_()
        y, log_det = transform(x, values=False)
        with torch.no_grad():
            y_score = score(torch.tensor(t, dtype=dtype, device=y.device), y.detach().to(dtype))
        (gradient,) = torch.autograd.grad((y * y_score.to(y)).sum() + log_det.sum(), x)
    return gradient


def _dtype(module: nn.Module) -> torch.dtype:
    dtype = tensor_settings(module).get("dtype", torch.get_default_dtype())
    return torch.promote_types(dtype, torch.float32)  # in which a network in half precision is solved, under autocast


def in_units(transform: Transform, y: Tensor) -> Tensor:
    """Samples in the units of the data, refused where these are beyond float64."""
    x = transform.inverse(y)
    check_finite_rows(
        x, "the samples", "the scale of the data's transform is beyond what float64 holds; rescale the data"
    )
    return x

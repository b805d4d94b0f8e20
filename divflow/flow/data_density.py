"""The density of data through their preprocessing: what tasks train and `divflow.load` returns."""

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from divflow.errors import DivflowError, FieldError
from divflow.flow.continuous import ContinuousFlow
from divflow.flow.evaluation import FlowEvaluation
from divflow.flow.importance import ImportanceWeights
from divflow.flow.named_context import from_columns
from divflow.flow.rows import check_finite_rows, checked_rows
from divflow.flow.settings import solved_settings
from divflow.flow.transforms import Affine, Transform
from divflow.flow.units import warn_of_far_context, warn_of_far_data
from divflow.manifolds import Coordinates
from divflow.operators.context import Context, cast_context, named_tensors

__all__ = ["FlowDensity", "computed_dtype", "in_units"]

_Density = TypeVar("_Density", bound="FlowDensity")


class FlowDensity(nn.Module):
    """The density of data in their own units, through a transform T of which a flow models the output.

        log p(x | c) = log p_flow(T(x) | S(c)) + log |det dT/dx|      x = T^-1(y), y from the flow

    Args:
        flow: of the transformed data.
        transform: T, from the data, with its log-determinant.
        context_transform: S, the standardization of contexts that are tensors, entry by entry. None if the flow takes
            contexts as they are, tensors or trees of tensors, or takes none.

    Attributes:
        columns: the names of the data's columns, if the density was loaded and they have names; else None.
        context_columns: those of the context's columns. A context may then be a dict of numbers by these names.
        context_range: the least and the largest of each of them in training, if the density was loaded and they are known; else None.
            A context far outside raises a warning.
        coordinates: in which the data's file has the points of a manifold, if the density was loaded and they are of such a file. Then
            `coordinates.rows(samples)` are in the file's terms.
        watch_units: whether `evaluate` with diagnostics warns about data that are farther from the base than the model's
            own samples. It is set when a density is loaded; a model in training is far from its data at first.

    Example:
        >>> from divflow import ContinuousFlow
        >>> from divflow.flow.transforms import Affine
        >>> density = FlowDensity(ContinuousFlow(lambda t, x: torch.zeros_like(x), 1), Affine(shift=10.0, scale=2.0))
        >>> density.log_prob(torch.tensor([[10.0]]))  # normal of mean 10 and standard deviation 2
        tensor([-1.6121])
    """

    columns: list[str] | None = None
    context_columns: list[str] | None = None
    context_range: list[list[float]] | None = None
    coordinates: Coordinates | None = None
    watch_units: bool = False

    def __init__(self, flow: ContinuousFlow, transform: Transform, context_transform: Affine | None = None) -> None:
        super().__init__()
        self.flow, self.transform, self.context_transform = flow, transform, context_transform

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the flow computes."""
        return computed_dtype(self.flow)

    @property
    def data_range(self) -> tuple[Tensor, Tensor] | None:
        """The least and the largest data allowed, which broadcast to the event; None if no bounds are known.

        They are those of its transform, or those that an adapted model was trained on, in the units of the data.
        """
        ends, model = self.transform.data_range, getattr(self.flow, "data_range", None)
        if ends is not None or model is None or not isinstance(self.transform, Affine):
            return ends
        low, high = (end * self.transform.scale + self.transform.shift for end in model)
        return torch.minimum(low, high), torch.maximum(low, high)

    def extra_repr(self) -> str:
        """Describe the range of the data, if it is known."""
        ends = self.data_range
        return "" if ends is None else f"data_range=({ends[0].min().item():g}, {ends[1].max().item():g})"

    def log_prob(self, x: Tensor, context: Context | None = None, generator: Generator | None = None) -> Tensor:
        """Compute the log-density of data x `(k, *event)` in nats, `(k,)`; the arguments are those of `evaluate`."""
        return self.evaluate(x, context, generator, diagnostics=False).log_prob

    def evaluate(
        self,
        x: Tensor,
        context: Context | None = None,
        generator: Generator | None = None,
        *,
        diagnostics: bool = True,
        penalties: Collection[str] = (),
    ) -> FlowEvaluation:
        """Evaluate the flow at the transformed data, with the transform's log-determinant added.

        Args:
            x: data `(k, *event)`.
            context: a tensor or a tree of tensors, one row per sample, in its own units; or, if `context_columns` are known, a dict
                with a number, or one number per sample, for each of them, such as `{"age": 41.0}`.
            generator: draws a stochastic estimator's probes.
            diagnostics: estimate the errors even if that takes further evaluations.
            penalties: integrals to take along the trajectory, as `ContinuousFlow.evaluate`.

        Returns:
            A `FlowEvaluation` whose log_prob is in the units of the data.

        Raises:
            FieldError: x is not a floating-point tensor `(k, *event)`, or has rows that are not finite or out of the range of
                the density.
        """
        numbers = None if self.coordinates is None else (len(self.coordinates.names),)
        if isinstance(x, Tensor) and x.shape[1:] == numbers != self.flow.event_shape:
            raise FieldError(
                f"x must be points of {self.flow.manifold}, but has shape {tuple(x.shape)}, as of rows of a file. Convert them by "
                "density.coordinates.points(x), and samples back by density.coordinates.rows(samples)."
            )
        x = checked_rows(x, self.flow.event_shape)
        context = self._context(context, len(x))
        flow_context = self.flow_context(context)
        try:
            y, log_det = self.transform(x, values=False)
            y, log_det = y.to(self.dtype), log_det.to(self.dtype)
            result = self.flow.evaluate(y, flow_context, generator, diagnostics=diagnostics, penalties=penalties)
        except (
            DivflowError
        ):  # values are read only after a failure, so that a training step need not wait for its device
            self.transform.check_values(x)
            for place, leaf in named_tensors(context):
                check_finite_rows(leaf, place)
            raise
        if self.watch_units and diagnostics:
            warn_of_far_data(self.flow.base, result.latent)
        return result._replace(log_prob=result.log_prob + log_det, log_det=result.log_det + log_det)

    @torch.no_grad()
    def sample(self, num_samples: int, context: Context | None = None, generator: Generator | None = None) -> Tensor:
        """Draw samples of the data `(num_samples, *event)` in float64, without gradient.

        Args:
            num_samples: how many.
            context: as of `evaluate`; one row `(1, ...)` of a context that is standardized is that of all samples.
            generator: draws the base samples.

        Raises:
            FieldError: samples that are not finite in the units of the data.
        """
        given = self.flow_context(self._context(context, num_samples, spread=True))
        return self.in_units(self.flow.sample(num_samples, given, generator))

    def in_units(self, y: Tensor) -> Tensor:
        """Map samples to the units of the data as `in_units` does; on a manifold, in float64, they lie on it to its rounding."""
        x = in_units(self.transform, y)
        return x if self.flow.manifold is None else self.flow.manifold.project(x)

    def _context(self, context: Context | None, count: int, *, spread: bool = False) -> Context | None:
        """A context of `count` samples that is given by the names of its columns as a tensor; any other as it is.

        With `spread` one row is that of all samples.

        Raises:
            FieldError: the density standardizes contexts, and none is given.
        """
        columns, standardized = self.context_columns, self.context_transform
        if standardized is None:
            return context
        if context is None:
            features = standardized.shift.numel()
            named = f" of {', '.join(columns)}, or a dict of numbers by these names" if columns else ""
            raise FieldError(
                f"the density is conditional, but no context was given. Give a tensor ({count}, {features}){named}."
            )
        if isinstance(context, Mapping) and columns is not None:
            return from_columns(context, columns, count, standardized.shift)
        if spread and isinstance(context, Tensor) and context.shape == (1, *standardized.shift.shape):
            return context.expand(count, *context.shape[1:])
        return context

    def flow_context(self, context: Context | None) -> Context | None:
        """Convert a context to what the flow takes: S(c), or c itself, floating-point tensors in the flow's dtype.

        Raises:
            FieldError: a leaf that is not a tensor; with an S, a context that is not a tensor of its features.
        """
        if context is None or self.context_transform is None:
            named_tensors(context)
            return cast_context(context, self.dtype)
        features, found = tuple(self.context_transform.shift.shape), getattr(context, "shape", None)
        if found is None or tuple(found[1:]) != features:
            what = f"a {type(context).__name__}" if found is None else f"of shape {tuple(found)}"
            raise FieldError(
                f"the context must be a tensor (k, {', '.join(map(str, features))}), one row per sample, which this density standardizes, "
                f"but is {what}.{_remedy(context, features)}"
            )
        given = checked_rows(context, name="the context")
        if self.context_range is not None:
            warn_of_far_context(given, self.context_range, self.context_columns)
        return self.context_transform(given, values=False)[0].to(self.dtype)

    def importance_weights(
        self,
        log_target: Callable[[Tensor], Tensor],
        num_samples: int,
        generator: Generator | None = None,
        *,
        context: Context | None = None,
        correct: bool = False,
        batch_size: int | None = None,
    ) -> ImportanceWeights:
        """Draw samples of the data weighted towards a target, as `divflow.flow.importance.importance_weights` of the flow.

        Args:
            log_target: of data `(n, *event)` in float64, `(n,)`, in nats; log Z is in its units.
            num_samples: n, at least 2.
            generator: of the samples.
            context: as of `sample`.
            correct: subtracts half the variance of an estimated log p.
            batch_size: samples per solve, which bounds the memory.
        """

        def of_transformed(y: Tensor) -> Tensor:
            x = in_units(self.transform, y)
            target = log_target(x.clone())
            # A wrong shape must be refused as it is; broadcast, it might look like one value per sample.
            fits = isinstance(target, Tensor) and target.shape == (len(x),)
            return target - self.transform(self.transform.unrounded(y))[1] if fits else target

        found = self.flow.importance_weights(
            of_transformed,
            num_samples,
            generator,
            context=self.flow_context(self._context(context, num_samples, spread=True)),
            correct=correct,
            batch_size=batch_size,
        )
        return found._replace(samples=in_units(self.transform, found.samples))

    def with_flow(self, flow: ContinuousFlow) -> "FlowDensity":
        """Return the same density, evaluated by another flow, such as one with another estimator."""
        return self.like_this(FlowDensity(flow, self.transform, self.context_transform))

    def like_this(self, other: _Density) -> _Density:
        """Give another density of the same data the attributes of this one."""
        for name in ("columns", "context_columns", "context_range", "coordinates", "watch_units"):
            setattr(other, name, getattr(self, name))
        return other


def _remedy(context: object, features: tuple[int, ...]) -> str:
    """What to do with a context that is no tensor of these features."""
    shape = tuple(context.shape) if isinstance(context, Tensor) else None
    if shape == features:
        return " For one row, use context.unsqueeze(0)."
    if shape is not None and len(shape) == 1 and features == (1,):
        return " For one number per sample, use context.unsqueeze(1)."
    trees = " For trees of tensors, leave context_transform out and let the velocity standardize them."
    return trees + (
        " To give numbers by name, set context_columns to the names." if isinstance(context, Mapping) else ""
    )


def computed_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a network computes, at least float32; one in half precision is solved under autocast.

    Args:
        module: the network.
    """
    default = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return solved_settings(module).get("dtype", default)


def in_units(transform: Transform, y: Tensor) -> Tensor:
    """Map samples to the units of the data, or refuse them if these exceed float64.

    Args:
        transform: of the data.
        y: samples of the flow.
    """
    x = transform.inverse(y)
    check_finite_rows(
        x, "the samples", "the scale of the data's transform is beyond what float64 holds, so rescale the data"
    )
    return x

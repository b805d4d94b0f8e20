"""A model trained elsewhere as a field f(t, x), called as its own library calls it."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from divflow.divergence import Estimator, FieldError
from divflow.errors import DivflowError, checked_range
from divflow.flow import ContinuousFlow, FlowEvaluation
from divflow.flow.settings import tensor_settings
from divflow.flow.units import warn_of_far_data, warn_of_range
from divflow.likelihood import Likelihood, Quadrature
from divflow.operators.calling import TIMES
from divflow.operators.context import Context, mapped, named_tensors
from divflow.operators.field import checked_value
from divflow.score.field import parameters_of
from divflow.solver import Solver
from divflow.verification.noise import draws
from divflow.verification.seeded import seeded

__all__ = ["AdaptedFlow", "AdapterError", "Foreign", "adapted_flow"]

# Names of a time among a model's arguments.
_TIMES = TIMES | {"sigma", "sigmas"}
# Errors of a model that does not take its arguments.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


class AdapterError(DivflowError, ValueError):
    """A model, or an argument given with it, is not what an adapter takes; the message gives what it expects."""


class Foreign(nn.Module):
    """Call a model as f(t, x), or f(t, x, context), for times and states of the flow.

    The model is evaluated as it is, so dropout or batch normalization in training mode are refused. Times are passed as they come,
    `()` or `(k,)`. A model that takes no scalar time gets one time a sample, as its first call finds out.

    Args:
        model: model as its library calls it.
        times: range of the flow's times that the model was trained for.
        context_name: name of the model's argument for the context; its third argument if None.

    Raises:
        AdapterError: the model is no callable. In a call: a time is outside of the range, or the model refuses its arguments.
    """

    signature: str
    """How the model is called, for messages."""

    time_first = False
    """Whether the model takes its time before its state."""

    def __init__(self, model: Callable[..., Any], times: tuple[float, float], context_name: str | None = None) -> None:
        super().__init__()
        kind = type(model).__name__
        if not callable(model):
            raise AdapterError(
                f"expected a model, called as {self.signature}, but got {'an' if kind[:1] in 'AEIOU' else 'a'} {kind}. Load "
                "weights into their module first"
            )
        self.model, self.times, self.context_name = model, times, context_name
        self._scalar_times: bool | None = None

    def arguments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """State and time in the scale and units of the model, for those of the flow; the same by default."""
        return x, t

    def known_context(self, count: int) -> Tensor | None:
        """Context of `count` rows that the model is known to take, or None."""
        return None

    def forward(self, t: Tensor, x: Tensor, context: Context | None = None) -> Tensor:
        """The model's value at time t, `()` or `(k,)`, and state x `(k, *event)`."""
        if len(x) == 0:
            return x.clone()  # many networks can't reshape an empty batch
        self._check_times(t)
        _refuse_training(self.model)
        if self._scalar_times is None:
            self._learn(t.detach().reshape(-1)[0], x.detach().clone(), context)
        return self._value(t if self._scalar_times else t.expand(len(x)), x, context)

    def check(self, event_shape: tuple[int, ...]) -> None:
        """Call the model once at random, and refuse it if the result shows that it is not what the adapter expects.

        A model that raises an error may only lack a context or a dtype, which its first use shows.

        Raises:
            AdapterError: the arguments are in the other order, a module is in training mode, or the value has another shape.
        """
        self._check_names()
        _refuse_training(self.model)
        noise = torch.randn((2, *event_shape), generator=Generator().manual_seed(0), device="cpu")
        x = noise.to(**tensor_settings(self.model))
        t = x.new_full((), sum(self.times) / 2)
        with seeded(0, [x.device] if x.is_cuda else []):
            try:
                self._learn(t, x, self.known_context(len(x)))
            except (AdapterError, FieldError) as error:
                if self._takes_the_other_order(t, x):
                    raise AdapterError(self._other_order(str(error))) from error
                if isinstance(error, AdapterError) and error.__cause__ is None:
                    raise  # a shape: the model's own errors are causes, and a dtype is a FieldError

    def call(self, state: Tensor, time: Tensor, context: Context | None) -> Tensor:
        """Output of the model for its own state and time.

        Raises:
            AdapterError: in place of an error of the model.
        """
        state, time = state.clone(), time.clone()  # which a model may write to
        context = mapped(Tensor.clone, context)
        given: tuple[Any, ...] = (time, state) if self.time_first else (state, time)
        named = {}
        if context is not None and self.context_name is not None:
            named = {self.context_name: context}
        elif context is not None:
            given = (*given, context)
        try:
            return self.model(*given, **named)
        except (DivflowError, torch.OutOfMemoryError):
            raise
        except _REFUSALS as error:
            raise AdapterError(self._refusal(error, state, time, context)) from error

    def extra_repr(self) -> str:
        """How the model is called, and for which times."""
        return f"{self.signature}, times={self.times}, context_name={self.context_name!r}"

    def _value(self, t: Tensor, x: Tensor, context: Context | None) -> Tensor:
        value = self.call(*self.arguments(t, x), context)
        if isinstance(value, Tensor) and value.shape != x.shape:
            raise AdapterError(
                f"{self.signature} returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}. Give a model "
                "that returns x's shape and takes its arguments in this order"
            )
        return checked_value(value, x)

    def _learn(self, t: Tensor, x: Tensor, context: Context | None) -> None:
        """Find whether the model takes a scalar time, or one a sample."""
        errors = []
        for scalar in (True, False):
            try:
                self._value(t if scalar else t.expand(len(x)), x, context)
            except (AdapterError, FieldError) as error:
                errors.append(error)
            else:
                self._scalar_times = scalar
                return
        # A wrong value is more informative than an error of the model itself.
        raise next((error for error in errors if error.__cause__ is None), errors[0])

    def _takes_the_other_order(self, t: Tensor, x: Tensor) -> bool:
        for times in (t, t.expand(len(x))):
            state, time = self.arguments(times, x)
            try:
                checked_value(self.model(*((state, time) if self.time_first else (time, state))), x)
            except torch.OutOfMemoryError:
                raise
            except _REFUSALS:
                continue
            return True
        return False

    def _check_names(self) -> None:
        """Refuse arguments whose names show the other order, which broadcasting would hide."""
        names = [p.name for p in parameters_of(self.model) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        place = 0 if self.time_first else 1
        if len(names) > 1 and names[1 - place] in _TIMES and names[place] not in _TIMES:
            raise AdapterError(self._other_order(f"its arguments are ({', '.join(names[:2])})"))

    def _check_times(self, t: Tensor) -> None:
        low, high = self.times
        slack = 1e-5 * (high - low)  # for rounding
        if bool(((t.detach() < low - slack) | (t.detach() > high + slack)).any()):
            raise AdapterError(
                f"the model is known for times of the flow in [{low:g}, {high:g}], but was evaluated at "
                f"{t.min().item():g} to {t.max().item():g}. Solve between flow.t_base and flow.t_data"
            )

    def _other_order(self, reason: str) -> str:
        mine, other = ("t, x", "x, t") if self.time_first else ("x, t", "t, x")
        adapter = "from_flow_matching" if self.time_first else "from_torchcfm"
        return (
            f"expected a model called as {self.signature}, but it takes its arguments in the other order ({reason}). Wrap "
            f"it, as lambda {mine}: model({other}), or use {adapter} for a velocity from noise at 0 to data at 1"
        )

    def _refusal(self, error: Exception, state: Tensor, time: Tensor, context: Context | None) -> str:
        text = str(error).splitlines()[0] if str(error) else "no message"
        handed = "as its third argument" if self.context_name is None else f"as {self.context_name}="
        given = (
            "and no context (log_prob(x, context) gives one)"
            if context is None
            else f"and {_described(context)} {handed} (context_name= names another)"
        )
        return (
            f"the model could not be called: {type(error).__name__}: {text}. Expected {self.signature}, given a "
            f"state of shape {tuple(state.shape)} and {state.dtype}, a time of shape {tuple(time.shape)} {given}. Check order, "
            f"context, image size and dtype (module.to({state.dtype}))"
        )


def _described(context: Context) -> str:
    if isinstance(context, Tensor):
        return f"a context of shape {tuple(context.shape)} and {context.dtype}"
    return "a context, " + ", ".join(f"{place} {tuple(it.shape)} {it.dtype}" for place, it in named_tensors(context))


class AdaptedFlow(ContinuousFlow):
    """Flow of a model that was trained elsewhere, which warns of data in other units than those of the training.

    Attributes:
        data_range: least and largest values of the training data, such as (-1, 1); None if not known.
    """

    data_range: tuple[float, float] | None = None

    def evaluate(
        self,
        x: Tensor,
        context: Context | None = None,
        generator: Generator | None = None,
        *,
        diagnostics: bool = True,
        penalties: Collection[str] = (),
    ) -> FlowEvaluation:
        """Evaluate as `ContinuousFlow`, with a `UnitsWarning` for data out of range, or farther from the base than samples."""
        result = super().evaluate(x, context, generator, diagnostics=diagnostics, penalties=penalties)
        if self.data_range is not None:
            warn_of_range(x, self.data_range)
        warn_of_far_data(self.base, result.latent)
        return result

    def extra_repr(self) -> str:
        """Everything but the submodules."""
        return f"{super().extra_repr()}, data_range={self.data_range}"


def adapted_flow(
    model: Foreign,
    velocity: nn.Module,
    event_shape: tuple[int, ...],
    *,
    base: Distribution | None,
    t_base: float = 0.0,
    t_data: float = 1.0,
    estimator: Estimator | None,
    likelihood: Likelihood | None,
    solver: Solver | None,
    data_range: tuple[float, float] | None,
) -> AdaptedFlow:
    """Make the flow of a velocity that calls a model, after a check of the model; None stands for the default of the adapters.

    The smoothness of a foreign model is not known, so intervals are divided to 1e-3 nats. At the tolerances of `Solver()` the error
    of the solver would be larger (some 1e-3 nats in 16 dimensions); at 1e-6 it is not. The base takes device and dtype of
    the model's parameters.
    """
    ends = None if data_range is None else checked_range("data_range", data_range)
    model.check(event_shape)
    flow = AdaptedFlow(
        velocity,
        event_shape,
        estimator=estimator,
        likelihood=Quadrature(tolerance=1e-3) if likelihood is None else likelihood,
        solver=Solver(rtol=1e-6, atol=1e-6) if solver is None else solver,
        base=base,
        t_base=t_base,
        t_data=t_data,
    )
    flow.data_range = ends
    settings = tensor_settings(model.model)
    if settings:
        dtype = torch.promote_types(settings["dtype"], torch.float32)  # in which a model in half precision is solved
        flow.base.to(device=settings["device"], dtype=dtype)
    return flow


def _refuse_training(model: object) -> None:
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if draws(module) or (module.training and normalizes):
            raise AdapterError(
                f"{name or 'the model'} is a {type(module).__name__} in training mode, so the model has no unique value at "
                "a point. Call its .eval() first, since adapters evaluate the model as it is"
            )
        if normalizes and not module.track_running_stats:
            raise AdapterError(
                f"{name or 'the model'} is a {type(module).__name__} that normalizes over the batch, so a single sample has "
                "no density. Use a model that does not, such as one with GroupNorm"
            )

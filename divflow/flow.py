"""Continuous normalizing flows: a density carried from a base to the data by an ODE."""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from divflow.arguments import checked_event_shape
from divflow.base_density import BaseDensity
from divflow.distribution import FlowDistribution
from divflow.divergence import Estimator, Exact, FieldError, shared_products
from divflow.divergence.check import accepts_sample_times
from divflow.divergence.compiled import eagerly
from divflow.divergence.field import checked_state
from divflow.divergence.transformed import refuse_transforms
from divflow.importance import ImportanceWeights, importance_weights
from divflow.likelihood import PENALTIES, ConditionedField, Finer, Likelihood, Quadrature, Transport, check_context
from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.rows import check_finite_rows
from divflow.solver import Evaluations, Solver, SolverError
from divflow.step_control import METHOD_ORDERS
from divflow.verification import severed_fields

__all__ = ["ContinuousFlow", "FlowEvaluation"]

# Times at which an estimator learns what it does of a flow: the nodes of fifteen.
_REFERENCE_TIMES = 15
# What a change by halved steps is multiplied by, over the geometric series of further halvings.
_SAFETY = 2.0
# Of a solve's and a sum's roundings, what may add up.
_ROUNDINGS = 8.0


class FlowEvaluation(NamedTuple):
    """A log-density with everything that is known of it.

    Attributes:
        log_prob: log p_data(x) = log p_base(latent) + log_det, in nats, `(k,)`.
        latent: the state at t_base, `(k, *event)`.
        log_det: log |det d latent / d x| = -integral from t_base to t_data of div v dt, in nats, `(k,)`.
        quadrature_error: estimated absolute error of log_prob, in nats, `(k,)`; None if not known. It is that of the
            integral at its nodes and, where further evaluations were allowed (`diagnostics`), that of the trajectory.
        standard_error: of log_prob under a stochastic estimator, in nats, `(k,)`: zero if exact, None if not known. From m
            probes it has m - 1 degrees of freedom: two of it hold 71 % of errors with 2 probes, and 93 % with 8.
        evaluations: of the field; `backward` grows when an adjoint gradient is taken.
        penalties: the integrals over time that were asked for, by name, `(k,)`.
        trajectory_error: the part of quadrature_error that the solver's steps have made, `(k,)`: twice what log_prob
            changes by if all of them are halved, and some rounding; infinite where that fails, None if not known.
    """

    log_prob: Tensor
    latent: Tensor
    log_det: Tensor
    quadrature_error: Tensor | None
    standard_error: Tensor | None
    evaluations: Evaluations
    penalties: dict[str, Tensor] = {}
    trajectory_error: Tensor | None = None


class ContinuousFlow(nn.Module):
    """The flow of dx/dt = v(t, x), which carries the base density at t_base to the data density at t_data.

        log p_data(x) = log p_base(z) - integral from t_base to t_data of (div v)(t, x_t) dt

    with x_t the trajectory through x at t_data and z its state at t_base (Chen et al. 2018). Everything is
    differentiable in x, the context, the parameters and the two times (where they are tensors), to any order
    with `Solver(gradient="direct")`. Within `torch.func`'s `grad`, `jacrev` and `jvp` a solver of fixed steps is needed; `vmap`
    is refused, since a batch of samples is taken anyway.

    Args:
        velocity: a module or function `v(t, x)`, or `v(t, x, context)` for a conditional flow; returns a tensor
            of x's shape, t being a scalar or one time a sample. A velocity that takes scalar times only is
            recognised, and evaluated at one time after another.
        event_shape: shape of one sample, without the batch; an int for vectors.
        estimator: of the divergence.
        likelihood: `Quadrature()` or `Augmented()`.
        solver: of the trajectory.
        base: a `torch.distributions.Distribution` of this event shape and no batch shape (see
            `torch.distributions.Independent`); the standard normal if None. Its tensors move and are saved
            with the module, and start where the velocity's are.
        t_base: time of the base density, a number or a (trainable) tensor.
        t_data: time of the data density; may be earlier than t_base.
        detached: whether the velocity means what it hides from autograd (`detach`, `no_grad`), which is an error otherwise,
            since the divergence would leave it out.

    Raises:
        ValueError: a base of another event shape, or t_base equal to t_data.

    Example:
        >>> flow = ContinuousFlow(lambda t, x: -x, 2, t_data=2.0)
        >>> flow.encode(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """

    def __init__(
        self,
        velocity: Callable[..., Tensor],
        event_shape: int | Sequence[int],
        *,
        estimator: Estimator | None = None,
        likelihood: Likelihood | None = None,
        solver: Solver | None = None,
        base: Distribution | None = None,
        t_base: float | Tensor = 0.0,
        t_data: float | Tensor = 1.0,
        detached: bool = False,
    ) -> None:
        super().__init__()
        self.velocity = velocity
        self.event_shape = torch.Size(checked_event_shape(event_shape))
        self.estimator = Exact() if estimator is None else estimator
        self.likelihood = Quadrature() if likelihood is None else likelihood
        self.solver = Solver() if solver is None else solver
        self._check()
        if _as_number(t_base) == _as_number(t_data):
            raise ValueError(f"t_base and t_data must differ, but both are {t_base}")
        self.t_base, self.t_data, self.detached = t_base, t_data, detached
        settings = _settings_of(velocity)
        normal = _standard_normal(self.event_shape, **settings) if base is None else base
        self.base = BaseDensity(normal, self.event_shape)
        self.base.to(settings.get("device"))  # which torch's default device, where a base is made, need not be
        self._sample_times: bool | None = None

    def log_prob(self, x: Tensor, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """The log-density of x `(k, *event)` in nats, `(k,)`; `generator` draws a stochastic estimator's probes.

        Raises:
            FieldError: x, the context or the velocity's value has a wrong shape, dtype or device; rows that are not finite.
            SolverError: the trajectory could not be computed.
        """
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
        """The log-density of x `(k, *event)` with its latent, errors and evaluations.

        Args:
            x: data.
            context: one row a sample.
            generator: of a stochastic estimator's probes.
            diagnostics: estimate the errors even where that takes further evaluations; else they are None.
            penalties: integrals to take along the trajectory (Finlay et al. 2020): "kinetic_energy", of |v|^2, and
                "jacobian_norm", of |dv/dx|_F^2, which is estimated, unbiased, from the products with the
                estimator's own probes, or from one more where the divergence is exact. They need `Quadrature`.

        Raises:
            FieldError, SolverError: as `log_prob`.
            ValueError: an unknown penalty.
        """
        unknown = set(penalties) - set(PENALTIES)
        if unknown:
            raise ValueError(f"penalties must be of {sorted(PENALTIES)}, but got {sorted(unknown)}")
        evaluations = Evaluations()
        carried = self._transport(
            x,
            context,
            self.t_data,
            self.t_base,
            generator,
            evaluations=evaluations,
            diagnostics=diagnostics,
            penalties=penalties,
        )
        self.base.check_states(x)
        log_base = self.base.log_prob(carried.state)
        error, trajectory_error = carried.quadrature_error, None
        if carried.finer is not None:
            trajectory_error = self._trajectory_error(log_base, carried.log_det, carried.finer)
            error = trajectory_error if error is None else error + trajectory_error
        return FlowEvaluation(
            log_base + carried.log_det,
            carried.state,
            carried.log_det,
            error,
            carried.standard_error,
            evaluations,
            carried.penalties,
            trajectory_error,
        )

    @torch.no_grad()
    def _trajectory_error(self, log_base: Tensor, log_det: Tensor, finer: Finer) -> Tensor:
        """Of log p, from that by halved steps."""
        order = METHOD_ORDERS.get(self.solver.method, 5)
        after, before = self.base.log_prob(finer.state), log_base.detach()
        moved = torch.where(after == before, 0.0, after - before) + finer.log_det  # of two infinities nothing is left
        rounding = torch.finfo(before.dtype).eps * (1 + before.abs().nan_to_num(posinf=0.0) + log_det.detach().abs())
        return _SAFETY / (1 - 0.5**order) * moved.abs() + _ROUNDINGS * rounding

    def rsample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples `(num_samples, *event)` and their log-densities `(num_samples,)`, differentiable in the parameters.

        Args:
            num_samples: how many.
            context: one row a sample, `(num_samples, ...)`.
            generator: draws the base samples and the probes.
        """
        samples, evaluation = self.rsample_and_evaluate(num_samples, context, generator)
        return samples, evaluation.log_prob

    def rsample_and_evaluate(
        self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, FlowEvaluation]:
        """Samples `(num_samples, *event)` and what is known of their log-densities, from one solve; see `rsample_and_log_prob`."""
        z, evaluations = self.sample_base(num_samples, generator), Evaluations()
        carried = self._transport(
            z, context, self.t_base, self.t_data, generator, evaluations=evaluations, diagnostics=False
        )
        self.base.check_states(carried.state)
        log_prob = self.base.log_prob(z) - carried.log_det
        known = carried.quadrature_error, carried.standard_error
        return carried.state, FlowEvaluation(log_prob, z, -carried.log_det, *known, evaluations)

    def distribution(self, context: Tensor | None = None, context_dim: int = 1) -> FlowDistribution:
        """The flow as a `torch.distributions.Distribution`, given one context or a batch of them."""
        return FlowDistribution(self, context, context_dim)

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
        """Samples weighted towards a target that is known up to a constant: `divflow.importance.importance_weights`."""
        return importance_weights(
            self, log_target, num_samples, generator, context=context, correct=correct, batch_size=batch_size
        )

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Samples `(num_samples, *event)`, without gradient; `context` has one row a sample."""
        return self.decode(self.sample_base(num_samples, generator), context)

    def sample_base(self, num_samples: int, generator: Generator | None = None) -> Tensor:
        """Draws of the base `(num_samples, *event)`, in the dtype of the velocity's parameters, if they are of one.

        In float32 where that is a coarser one, in which no trajectory can be solved.
        """
        module = self.velocity if isinstance(self.velocity, nn.Module) else nn.Module()
        dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        dtype = dtypes.pop() if len(dtypes) == 1 else self.base.dtype
        if dtype.itemsize < torch.float32.itemsize:
            dtype = torch.promote_types(self.base.dtype, torch.float32)
        return self.base.sample(num_samples, generator, dtype)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent z `(k, *event)` at t_base of data x at t_data."""
        return self.trajectory(x, [self.t_data, self.t_base], context)[-1]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data x `(k, *event)` at t_data of latents z at t_base."""
        x = self.trajectory(z, [self.t_base, self.t_data], context)[-1]
        self.base.check_states(x)
        return x

    @eagerly
    def trajectory(self, x: Tensor, times: Sequence[float | Tensor], context: Tensor | None = None) -> Tensor:
        """The states at `times`, the first of which is x's own: `(len(times), k, *event)`."""
        if not isinstance(times, Sequence | Tensor) or len(times) == 0:
            raise ValueError(f"times must hold at least that of x, but is {times!r}")
        with _outside_inference_mode(), _rows_named(x, context):
            x, field = self._prepare(x, context)
            (states,) = self.solver.solve(
                lambda t, state: (field(t, state[0]),),
                (x,),
                torch.stack([_as_scalar(t, x) for t in times]),
                parameters=field.differentiable_tensors(),
                size=field.finest_scale,
            )
        return states

    def times(self) -> tuple[float, float]:
        """t_base and t_data as numbers."""
        return _as_number(self.t_base), _as_number(self.t_data)

    def field(self, context: Tensor | None = None) -> ConditionedField:
        """The velocity as a field g(t, x), with the context bound to it."""
        return ConditionedField(self.velocity, context, bool(self._sample_times))

    def replace(
        self,
        *,
        estimator: Estimator | None = None,
        likelihood: Likelihood | None = None,
        solver: Solver | None = None,
    ) -> "ContinuousFlow":
        """The same flow, sharing velocity and base, evaluated in another way; what is None stays."""
        flow = copy.copy(self)
        flow.estimator = self.estimator if estimator is None else estimator
        flow.likelihood = self.likelihood if likelihood is None else likelihood
        flow.solver = self.solver if solver is None else solver
        flow._check()
        return flow

    def extra_repr(self) -> str:
        """Everything but the submodules."""
        return (
            f"event_shape={tuple(self.event_shape)}, estimator={self.estimator}, likelihood={self.likelihood}, "
            f"solver={self.solver}, t_base={self.t_base}, t_data={self.t_data}"
        )

    def _check(self) -> None:
        for name, kind in (("estimator", Estimator), ("likelihood", Likelihood), ("solver", Solver)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be an instance of {kind.__name__}, but is {getattr(self, name)!r}")
        if self.solver.gradient == "adjoint" and not isinstance(self.velocity, nn.Module):
            raise ValueError(
                "gradient='adjoint' needs a velocity that is an nn.Module, to know its parameters, but got "
                f"{type(self.velocity).__name__}; wrap it in a module, or use Solver(gradient='direct')"
            )

    @eagerly
    def _transport(
        self,
        x: Tensor,
        context: Tensor | None,
        t_start: float | Tensor,
        t_end: float | Tensor,
        generator: Generator | None,
        *,
        diagnostics: bool,
        evaluations: Evaluations | None = None,
        penalties: Collection[str] = (),
    ) -> Transport:
        with _outside_inference_mode(), _rows_named(x, context):
            x, field = self._prepare(x, context)
            if self._sample_times is None and len(x):
                alone = self.field(None if context is None else context.detach())
                # One sample has one time, which a velocity of scalar times takes, too.
                copies = 2 if len(x) == 1 else 1
                states = x.detach().repeat(copies, *[1] * (x.ndim - 1))
                self._sample_times = accepts_sample_times(alone.repeat(copies), *self.times(), states)
                field.sample_times = self._sample_times
            with shared_products(), severed_fields("allow" if self.detached else "refuse"):
                return self.likelihood.transport(
                    field,
                    x,
                    _as_scalar(t_start, x),
                    _as_scalar(t_end, x),
                    estimator=self.estimator.prepare(field, x, functools.partial(self._trajectories, context)),
                    solver=self.solver,
                    evaluations=Evaluations() if evaluations is None else evaluations,
                    generator=generator,
                    diagnostics=diagnostics,
                    penalties=penalties,
                )

    def _trajectories(self, context: Tensor | None, references: Tensor) -> tuple[Tensor, Tensor]:
        """For `Estimator.prepare`."""
        if context is not None:
            raise FieldError(
                "reference samples of a conditional flow would need contexts of their own, which an estimator can't "
                "carry; take references from the batch, such as ControlVariate(Hutchinson(), references=16)"
            )
        start, end = sorted(self.times())
        times = [start + (end - start) * node for node in gauss_kronrod(_REFERENCE_TIMES).nodes.tolist()]
        backwards = self.times()[1] == end
        ordered = times[::-1] if backwards else times
        states = self.trajectory(references, [self.t_data, *ordered])[1:]
        return references.new_tensor(times), states.flip(0) if backwards else states

    def _prepare(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ConditionedField]:
        refuse_transforms("a flow's solve", "take all samples as one batch", only_vmap=True)
        x = checked_state(x)
        if x.shape[1:] != self.event_shape:
            raise FieldError(
                f"the flow's event shape is {tuple(self.event_shape)}, so x must have shape "
                f"(k, {', '.join(map(str, self.event_shape))}), but has {tuple(x.shape)}"
            )
        check_context(context, x)
        # Tensors made in inference mode can't enter the graphs that the estimators need.
        x = x.clone() if x.is_inference() else x
        context = context.clone() if context is not None and context.is_inference() else context
        return x, self.field(context)


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, in which estimators could not differentiate; no graph is kept all the same."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextlib.contextmanager
def _rows_named(x: Tensor, context: Tensor | None) -> Iterator[None]:
    """Where a solve fails, say which rows are not finite; their values are not read before, for which the host would wait."""
    try:
        yield
    except SolverError:
        check_finite_rows(x)
        if context is not None:
            check_finite_rows(context, "the context")
        raise


def _standard_normal(event_shape: torch.Size, **settings: Any) -> Distribution:
    loc, scale = torch.zeros(event_shape, **settings), torch.ones(event_shape, **settings)
    return Independent(Normal(loc, scale, validate_args=False), len(event_shape))


def _settings_of(velocity: object) -> dict[str, Any]:
    """Device, and dtype of float32 at least, of a module's first floating tensor; nothing for what holds none."""
    tensors = itertools.chain(velocity.parameters(), velocity.buffers()) if isinstance(velocity, nn.Module) else ()
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": torch.promote_types(first.dtype, torch.float32)}


def _as_number(t: float | Tensor) -> float:
    if not isinstance(t, Real) and not (isinstance(t, Tensor) and t.numel() == 1):
        raise ValueError(f"t_base and t_data must be numbers, or tensors of one, but one of them is {t!r}")
    number = t.item() if isinstance(t, Tensor) else float(t)
    if not math.isfinite(number):
        raise ValueError(f"t_base and t_data must be finite, but one of them is {t!r}")
    return number


def _as_scalar(t: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(t, Tensor):
        return t.to(x).reshape(())
    return x.new_full((), t)  # filled there; a tensor made here would have to be copied, for which the host waits

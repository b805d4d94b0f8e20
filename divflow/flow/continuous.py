"""Continuous normalizing flows: a density carried from a base to the data by an ODE."""

import copy
import functools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from divflow.distributions import BaseDensity, standard_normal
from divflow.divergence import Estimator, Exact, FieldError, shared_products
from divflow.divergence.check import accepts_sample_times
from divflow.errors import checked_event_shape
from divflow.flow.distribution import ContextDim, FlowDistribution, flow_distribution
from divflow.flow.evaluation import FlowEvaluation, trajectory_error
from divflow.flow.importance import ImportanceWeights, importance_weights
from divflow.flow.settings import solved_settings
from divflow.flow.solving import as_number, as_scalar, check_reached, check_times, explained, outside_inference_mode
from divflow.likelihood import PENALTIES, ConditionedField, Likelihood, Quadrature, Transport
from divflow.likelihood.gauss_kronrod import gauss_kronrod
from divflow.operators.compiled import eagerly
from divflow.operators.context import Context, check_context, mapped
from divflow.operators.field import checked_state
from divflow.operators.transformed import refuse_transforms
from divflow.solver import Evaluations, Solver
from divflow.verification import severed_fields

__all__ = ["ContinuousFlow"]

# Times at which an estimator learns what it does of a flow: the nodes of fifteen.
_REFERENCE_TIMES = 15


class ContinuousFlow(nn.Module):
    """The flow of dx/dt = v(t, x), which carries the base density at t_base to the data density at t_data.

        log p_data(x) = log p_base(z) - integral from t_base to t_data of (div v)(t, x_t) dt

    with x_t the trajectory through x at t_data and z its state at t_base (Chen et al. 2018). Everything is
    differentiable in x, the context, the parameters and the two times (where they are tensors), to any order
    with `Solver(gradient="direct")`. Within `torch.func`'s `grad`, `jacrev` and `jvp` a solver of fixed steps is needed; `vmap`
    is refused, since a batch of samples is taken anyway.

    Args:
        velocity: a module or function `v(t, x)`, or `v(t, x, context)` for a conditional flow, the context being a tensor or a
            tree of tensors (dict, tuple, list) of any dtype, one row a sample; returns a tensor of x's shape, t being a scalar or one time a sample. A velocity that takes scalar times only is
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
        check_times(t_base, t_data)
        self.t_base, self.t_data, self.detached = t_base, t_data, detached
        settings = solved_settings(velocity)
        normal = standard_normal(self.event_shape, **settings) if base is None else base
        self.base = BaseDensity(normal, self.event_shape)
        self.base.to(settings.get("device"))  # which torch's default device, where a base is made, need not be
        self._sample_times: bool | None = None

    def log_prob(self, x: Tensor, context: Context | None = None, generator: Generator | None = None) -> Tensor:
        """The log-density of x `(k, *event)` in nats, `(k,)`; `generator` draws a stochastic estimator's probes.

        Raises:
            FieldError: x, the context or the velocity's value has a wrong shape, dtype or device; rows that are not finite.
            SolverError: the trajectory could not be computed.
        """
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
        """The log-density of x `(k, *event)` with its latent, errors and evaluations.

        Args:
            x: data.
            context: a tensor or a tree of tensors (dict, tuple, list) of any dtype, one row a sample, as the velocity takes it.
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
        check_reached(self.solver, x, carried.state, log_base)
        error, changed = carried.quadrature_error, trajectory_error(self.base, self.solver, log_base, carried)
        if changed is not None:
            error = changed if error is None else error + changed
        log_det, noise, integrals = carried.log_det, carried.standard_error, carried.penalties
        return FlowEvaluation(log_base + log_det, carried.state, log_det, error, noise, evaluations, integrals, changed)

    def rsample_and_log_prob(
        self, num_samples: int, context: Context | None = None, generator: Generator | None = None
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
        self, num_samples: int, context: Context | None = None, generator: Generator | None = None
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

    def distribution(self, context: Context | None = None, context_dim: ContextDim = 1) -> FlowDistribution:
        """The flow as a `torch.distributions.Distribution`, given one context or a batch of them."""
        return flow_distribution(self, context, context_dim)

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
        """Samples weighted towards a target that is known up to a constant: `divflow.flow.importance.importance_weights`."""
        return importance_weights(
            self, log_target, num_samples, generator, context=context, correct=correct, batch_size=batch_size
        )

    @torch.no_grad()
    def sample(self, num_samples: int, context: Context | None = None, generator: Generator | None = None) -> Tensor:
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

    def encode(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The latent z `(k, *event)` at t_base of data x at t_data."""
        return self.trajectory(x, [self.t_data, self.t_base], context)[-1]

    def decode(self, z: Tensor, context: Context | None = None) -> Tensor:
        """The data x `(k, *event)` at t_data of latents z at t_base."""
        x = self.trajectory(z, [self.t_base, self.t_data], context)[-1]
        self.base.check_states(x)
        return x

    @eagerly
    def trajectory(self, x: Tensor, times: Sequence[float | Tensor], context: Context | None = None) -> Tensor:
        """The states at `times`, the first of which is x's own: `(len(times), k, *event)`."""
        if not isinstance(times, Sequence | Tensor) or len(times) == 0:
            raise ValueError(f"times must hold at least that of x, but is {times!r}")
        with outside_inference_mode(), explained(x, context, self.times):
            x, field = self._prepare(x, context)
            (states,) = self.solver.solve(
                lambda t, state: (field(t, state[0]),),
                (x,),
                torch.stack([as_scalar(t, x) for t in times]),
                parameters=field.differentiable_tensors(),
                size=field.finest_scale,
            )
        return states

    def times(self) -> tuple[float, float]:
        """t_base and t_data as numbers."""
        return as_number(self.t_base), as_number(self.t_data)

    def field(self, context: Context | None = None) -> ConditionedField:
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
        context: Context | None,
        t_start: float | Tensor,
        t_end: float | Tensor,
        generator: Generator | None,
        *,
        diagnostics: bool,
        evaluations: Evaluations | None = None,
        penalties: Collection[str] = (),
    ) -> Transport:
        with outside_inference_mode(), explained(x, context, self.times):
            x, field = self._prepare(x, context)
            if self._sample_times is None and x.numel():
                alone = self.field(mapped(Tensor.detach, context))
                # One sample has one time, which a velocity of scalar times takes, too.
                copies = 2 if len(x) == 1 else 1
                states = x.detach().repeat(copies, *[1] * (x.ndim - 1))
                self._sample_times = accepts_sample_times(alone.repeat(copies), *self.times(), states)
                field.sample_times = self._sample_times
            with shared_products(), severed_fields("allow" if self.detached else "refuse"):
                return self.likelihood.transport(
                    field,
                    x,
                    as_scalar(t_start, x),
                    as_scalar(t_end, x),
                    estimator=self.estimator.prepare(field, x, functools.partial(self._trajectories, context)),
                    solver=self.solver,
                    evaluations=Evaluations() if evaluations is None else evaluations,
                    generator=generator,
                    diagnostics=diagnostics,
                    penalties=penalties,
                )

    def _trajectories(self, context: Context | None, references: Tensor) -> tuple[Tensor, Tensor]:
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

    def _prepare(self, x: Tensor, context: Context | None) -> tuple[Tensor, ConditionedField]:
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
        context = mapped(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, context)
        return x, self.field(context)

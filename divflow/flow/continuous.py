"""Continuous normalizing flows: a density carried from a base to the data by an ODE."""

import copy
import functools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from divflow.distributions import BaseDensity
from divflow.divergence import Estimator, Exact, FieldError, shared_products
from divflow.divergence.check import accepts_sample_times
from divflow.errors import checked_event_shape
from divflow.flow.distribution import ContextDim, FlowDistribution, flow_distribution
from divflow.flow.evaluation import FlowEvaluation, trajectory_error
from divflow.flow.importance import ImportanceWeights, importance_weights
from divflow.flow.on_manifold import arrived, based_on, check_period, landed, on_manifold
from divflow.flow.references import trajectories
from divflow.flow.settings import drawn_dtype, solved_settings
from divflow.flow.solving import as_number, as_scalar, check_reached, check_times, explained, outside_inference_mode
from divflow.likelihood import PENALTIES, ConditionedField, Likelihood, Quadrature, Transport
from divflow.manifolds import Manifold
from divflow.operators.compiled import eagerly
from divflow.operators.context import Context, check_context, mapped
from divflow.operators.field import checked_field, checked_state
from divflow.operators.transformed import refuse_transforms
from divflow.solver import Evaluations, Solver
from divflow.verification import severed_fields

__all__ = ["ContinuousFlow"]


class ContinuousFlow(nn.Module):
    """A density carried from a base to the data by the ODE dx/dt = v(t, x): log-densities, samples and latents.

        log p_data(x) = log p_base(z) - integral from t_base to t_data of (div v)(t, x_t) dt

    with x_t the trajectory through x at t_data and z its state at t_base (Chen et al. 2018). Log-densities are in nats.

    Everything is differentiable in x, the context, the parameters and the two times (if they are tensors): to any order
    with `Solver(gradient="direct")`. Inside `torch.func`'s `grad`, `jacrev` and `jvp` a solver of fixed steps is needed;
    `vmap` is refused, because the flow takes a batch of samples anyway.

    Args:
        velocity: a module or function `v(t, x)`, or `v(t, x, context)` for a conditional flow.

            - It returns a tensor of x's shape.
            - t is a scalar or one time per sample. A velocity that takes only scalar times is recognised and evaluated at
              one time after another.
            - The context is a tensor or a tree of tensors (dict, tuple, list) of any dtype, with one row per sample.
        event_shape: shape of one sample; an int for vectors.
        estimator: of the divergence.
        likelihood: `Quadrature()` or `Augmented()`.
        solver: of the trajectory.
        base: a `torch.distributions.Distribution` of this event shape and no batch shape; the standard normal if None.
            Its tensors move and are saved with the module, and start on the velocity's device.
        t_base: time of the base density, a number or a (trainable) tensor.
        t_data: time of the data density; may be earlier than t_base.
        manifold: on which the states lie, of `divflow.manifolds`; None for all of space. The velocity's tangent part is taken, log-densities
            are with respect to the Riemannian volume, and the base is uniform unless given.
        detached: True declares that the velocity hides parts from autograd on purpose (`detach`, `no_grad`). Otherwise they
            are an error, because the divergence would leave them out.

    Raises:
        ValueError: a base of another event shape, t_base equal to t_data, or a velocity that is a class, or takes (x, t).
        ManifoldError: a manifold of another shape, or a velocity or base of another manifold; in calls, points off the manifold, or a
            velocity without the period of a torus.

    Example:
        >>> flow = ContinuousFlow(lambda t, x: -x, 2)  # x = z exp(-1)
        >>> flow.log_prob(torch.zeros(1, 2))
        tensor([0.1621])
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
        manifold: Manifold | None = None,
        detached: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(checked_event_shape(event_shape))
        self.velocity, self.manifold = on_manifold(checked_field(velocity), manifold, self.event_shape)
        self.estimator = Exact() if estimator is None else estimator
        self.likelihood = Quadrature() if likelihood is None else likelihood
        self.solver = Solver() if solver is None else solver
        self._check()
        check_times(t_base, t_data)
        self.t_base, self.t_data, self.detached = t_base, t_data, detached
        settings = solved_settings(velocity)
        self.base = BaseDensity(based_on(self.manifold, base, self.event_shape, **settings), self.event_shape)
        self.base.to(settings.get("device"))  # a base is made on torch's default device, which may be another
        self._sample_times: bool | None = None

    def log_prob(self, x: Tensor, context: Context | None = None, generator: Generator | None = None) -> Tensor:
        """Compute the log-density of data in nats, `(k,)`.

        Args:
            x: data `(k, *event)`.
            context: as the velocity takes it, one row per sample.
            generator: draws a stochastic estimator's probes.

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
        """Compute the log-density of data with its latent, error estimates and counted evaluations, a `FlowEvaluation`.

        Args:
            x: data `(k, *event)`.
            context: a tensor or a tree of tensors (dict, tuple, list) of any dtype, one row per sample.
            generator: draws a stochastic estimator's probes.
            diagnostics: estimate the errors even if that takes further evaluations; otherwise those are None.
            penalties: integrals to take along the trajectory (Finlay et al. 2020), which need `Quadrature`: "kinetic_energy",
                of |v|^2, and "jacobian_norm", of |dv/dx|_F^2. The latter is estimated without bias from the products with
                the estimator's own probes, or from one more product if the divergence is exact.

        Raises:
            FieldError: as `log_prob`.
            SolverError: as `log_prob`.
            ValueError: an unknown penalty.
        """
        unknown = set(penalties) - set(PENALTIES)
        if unknown:
            raise ValueError(f"penalties must be among {sorted(PENALTIES)}, but got {sorted(unknown)}")
        if "jacobian_norm" in penalties and self.manifold is not None:
            raise ValueError("jacobian_norm is not known on manifolds; take the penalty kinetic_energy alone")
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
        log_det, noise, integrals, off = (
            carried.log_det,
            carried.standard_error,
            carried.penalties,
            carried.off_manifold,
        )
        known = error, noise, evaluations, integrals, changed, off
        return FlowEvaluation(log_base + log_det, carried.state, log_det, *known)

    def rsample_and_log_prob(
        self, num_samples: int, context: Context | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples `(num_samples, *event)` with their log-densities `(num_samples,)`, differentiable in the parameters.

        Args:
            num_samples: how many.
            context: one row per sample, `(num_samples, ...)`.
            generator: draws the base samples and the probes.
        """
        samples, evaluation = self.rsample_and_evaluate(num_samples, context, generator)
        return samples, evaluation.log_prob

    def rsample_and_evaluate(
        self, num_samples: int, context: Context | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, FlowEvaluation]:
        """Draw samples `(num_samples, *event)` with a `FlowEvaluation` of each; arguments as `rsample_and_log_prob`."""
        z, evaluations = self.sample_base(num_samples, generator), Evaluations()
        carried = self._transport(
            z, context, self.t_base, self.t_data, generator, evaluations=evaluations, diagnostics=False
        )
        self.base.check_states(carried.state)
        log_prob = self.base.log_prob(z) - carried.log_det
        known = carried.quadrature_error, carried.standard_error, evaluations
        return carried.state, FlowEvaluation(log_prob, z, -carried.log_det, *known, off_manifold=carried.off_manifold)

    def distribution(self, context: Context | None = None, context_dim: ContextDim = 1) -> FlowDistribution:
        """Return the flow as a `torch.distributions.Distribution`; arguments as of `FlowDistribution`."""
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
        """Draw samples weighted towards a target that is known up to a constant, by `divflow.flow.importance.importance_weights`."""
        return importance_weights(
            self, log_target, num_samples, generator, context=context, correct=correct, batch_size=batch_size
        )

    @torch.no_grad()
    def sample(self, num_samples: int, context: Context | None = None, generator: Generator | None = None) -> Tensor:
        """Draw samples `(num_samples, *event)`, without gradient; `context` has one row per sample."""
        return self.decode(self.sample_base(num_samples, generator), context)

    def sample_base(self, num_samples: int, generator: Generator | None = None) -> Tensor:
        """Draw from the base, `(num_samples, *event)`, in the dtype of the velocity's parameters, at least float32."""
        return self.base.sample(num_samples, generator, drawn_dtype(self.velocity, self.base.dtype))

    def encode(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Map data x at t_data to their latents z `(k, *event)` at t_base."""
        return self.trajectory(x, [self.t_data, self.t_base], context)[-1]

    def decode(self, z: Tensor, context: Context | None = None) -> Tensor:
        """Map latents z at t_base to data x `(k, *event)` at t_data."""
        x = self.trajectory(z, [self.t_base, self.t_data], context)[-1]
        self.base.check_states(x)
        return x

    @eagerly
    def trajectory(self, x: Tensor, times: Sequence[float | Tensor], context: Context | None = None) -> Tensor:
        """Compute the states at `times`, the first of which is x's own: `(len(times), k, *event)`."""
        if not isinstance(times, Sequence | Tensor) or len(times) == 0:
            raise ValueError(f"times must contain at least the time of x, but is {times!r}")
        with outside_inference_mode(), explained(x, context, self):
            x, field = self._prepare(x, context)
            (states,) = self.solver.solve(
                lambda t, state: (field(t, state[0]),),
                (x,),
                torch.stack([as_scalar(t, x) for t in times]),
                parameters=field.differentiable_tensors(),
                size=field.finest_scale,
            )
        return states if self.manifold is None else landed(self.manifold, states.flatten(0, 1))[0].view_as(states)

    def times(self) -> tuple[float, float]:
        """Return t_base and t_data as numbers."""
        return as_number(self.t_base), as_number(self.t_data)

    def field(self, context: Context | None = None) -> ConditionedField:
        """Return the velocity as a field g(t, x), with the context bound to it."""
        return ConditionedField(self.velocity, context, bool(self._sample_times))

    def replace(
        self,
        *,
        estimator: Estimator | None = None,
        likelihood: Likelihood | None = None,
        solver: Solver | None = None,
    ) -> "ContinuousFlow":
        """Return the same flow with another estimator, likelihood or solver; velocity and base are shared, None stays."""
        flow = copy.copy(self)
        flow.estimator = self.estimator if estimator is None else estimator
        flow.likelihood = self.likelihood if likelihood is None else likelihood
        flow.solver = self.solver if solver is None else solver
        flow._check()
        return flow

    def extra_repr(self) -> str:
        """Describe everything but the submodules."""
        on = "" if self.manifold is None else f", manifold={self.manifold}"
        return (
            f"event_shape={tuple(self.event_shape)}, estimator={self.estimator}, likelihood={self.likelihood}, "
            f"solver={self.solver}, t_base={self.t_base}, t_data={self.t_data}{on}"
        )

    def _check(self) -> None:
        for name, kind in (("estimator", Estimator), ("likelihood", Likelihood), ("solver", Solver)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be an instance of {kind.__name__}, but is {getattr(self, name)!r}")
        if self.solver.gradient == "adjoint" and not isinstance(self.velocity, nn.Module):
            raise ValueError(
                "gradient='adjoint' needs a velocity that is an nn.Module, to know its parameters, but got "
                f"{type(self.velocity).__name__}. Wrap it in a module, or use Solver(gradient='direct')."
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
        with outside_inference_mode(), explained(x, context, self):
            x, field = self._prepare(x, context)
            if self._sample_times is None and x.numel():
                alone = self.field(mapped(Tensor.detach, context))
                # A velocity of scalar times also takes the one time of one sample.
                copies = 2 if len(x) == 1 else 1
                states = x.detach().repeat(copies, *[1] * (x.ndim - 1))
                self._sample_times = accepts_sample_times(alone.repeat(copies), *self.times(), states)
                field.sample_times = self._sample_times
                check_period(self.velocity, self.times()[0], x, context)
            with shared_products(), severed_fields("allow" if self.detached else "refuse"):
                carried = self.likelihood.transport(
                    field,
                    x,
                    as_scalar(t_start, x),
                    as_scalar(t_end, x),
                    estimator=self.estimator.prepare(field, x, functools.partial(trajectories, self, context)),
                    solver=self.solver,
                    evaluations=Evaluations() if evaluations is None else evaluations,
                    generator=generator,
                    diagnostics=diagnostics,
                    penalties=penalties,
                )
            return arrived(self.manifold, carried)

    def _prepare(self, x: Tensor, context: Context | None) -> tuple[Tensor, ConditionedField]:
        refuse_transforms("a flow's solve", "take all samples as one batch", only_vmap=True)
        x = checked_state(x)
        if x.shape[1:] != self.event_shape:
            raise FieldError(
                f"the flow's event shape is {tuple(self.event_shape)}, so x must have shape "
                f"(k, {', '.join(map(str, self.event_shape))}), but has {tuple(x.shape)}"
            )
        check_context(context, x)
        if self.manifold is not None:
            self.manifold.check(x)
        # Tensors made in inference mode can't enter the graphs that the estimators need.
        x = x.clone() if x.is_inference() else x
        context = mapped(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, context)
        return x, self.field(context)

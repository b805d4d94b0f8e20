"""Trajectories of dx/dt = v(t, x) by torchdiffeq, with typed errors, checked options and counted evaluations."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from divflow.errors import check_count, check_positive
from divflow.operators.transformed import refuse_transforms
from divflow.solver.adjoint import Adjoint
from divflow.solver.dense_output import Steps
from divflow.solver.failures import SolverError, Unconverged, described, explained, unconverged_is_an_error
from divflow.solver.step_control import (
    ADAPTIVE,
    DEFAULT_STEPS,
    FIXED,
    METHODS,
    StepTimes,
    Tolerances,
    adaptive_options,
    adjoint_options,
    after_jump,
    check_options,
    fixed_options,
    limit_step,
    plain_options,
)

__all__ = ["Evaluations", "Solver"]

State = tuple[Tensor, ...]


@dataclass
class Evaluations:
    """Numbers of field evaluations, counted as they happen.

    Attributes:
        forward: in solves from one end to the other.
        backward: in adjoint solves, run by `.backward()`; a direct gradient differentiates the recorded steps and
            evaluates nothing.
        divergence: evaluations of the divergence. At quadrature nodes they come on top of `forward`; in an augmented solve
            each evaluation counts as both.
        diagnostics: evaluations, in solves and at nodes, for error estimates alone.
    """

    forward: int = 0
    backward: int = 0
    divergence: int = 0
    diagnostics: int = 0


@dataclass(frozen=True)
class Solver:
    """Choose how trajectories are computed: method, tolerances, gradient and options of torchdiffeq.

    Args:
        method: one of torchdiffeq's.

            - Adaptive: dopri5, dopri8, bosh3, fehlberg2, adaptive_heun.
            - Fixed steps: euler, midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams, fixed_adams.
            - Without gradients: scipy_solver.
        rtol: relative tolerance of adaptive methods, per step and for every sample, of the root mean square of the errors
            of its entries.
        atol: absolute tolerance, in units of the state. If a field knows the size of its state's finest details
            (`ProbabilityFlow.finest_scale`), both tolerances are multiplied by it while it is below one.
        gradient: how the solution is differentiated.

            - "direct" differentiates the steps taken: to any order, with memory that grows with their number.
            - "adjoint" solves backward in time: once differentiable, with constant memory, and correct only to the
              tolerance. The field is evaluated again there and must be the same function; one with dropout or a state is
              refused. Tensors that it uses and that are not parameters are found.
        options: of the method, by torchdiffeq's names; those that are None are left out.

            - A fixed-step method takes `step_size` (default: the span / 32).
            - `jump_t` (adaptive methods) names times of jumps, which no step and no interval of `Quadrature` crosses.
        max_evaluations: of the field, in one solve and again in its adjoint.

    Raises:
        ValueError: an unknown method, gradient or option, or a value out of range; the message has the valid ones.

    Example:
        >>> Solver("rk4").solve(lambda t, state: (-state[0],), (torch.ones(1),), torch.tensor([0.0, 0.5, 1.0]))[0].flatten()
        tensor([1.0000, 0.6065, 0.3679])
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: str = "direct"
    options: Mapping[str, Any] | None = None
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in list(METHODS):
            raise ValueError(f"unknown solver method {self.method!r}. Choose one of {', '.join(METHODS)}.")
        if self.gradient not in ("direct", "adjoint"):
            raise ValueError(f"gradient must be 'direct' or 'adjoint', but is {self.gradient!r}")
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f"options must map names to values, but is {self.options!r}")
        options = plain_options(self.options or {})
        check_options(self.method, options)
        object.__setattr__(self, "options", options or None)
        check_count("max_evaluations", self.max_evaluations)
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)

    @property
    def adaptive(self) -> bool:
        """Whether the steps follow the tolerances, and are known."""
        return METHODS[self.method] == ADAPTIVE

    @property
    def dense(self) -> bool:
        """Whether `solve` can record its steps, for states at times that are chosen afterwards."""
        restarts = (self.options or {}).get("jump_t") is not None
        return self.method == "dopri5" and self.gradient == "direct" and not restarts

    def solve(
        self,
        field: Callable[[Tensor, State], State],
        state: State,
        times: Tensor,
        *,
        evaluations: Evaluations | None = None,
        parameters: Sequence[Tensor] = (),
        record: Steps | None = None,
        accepted: StepTimes | None = None,
        size: Callable[[Tensor], Tensor] | None = None,
    ) -> State:
        """Compute the states at all `times`, starting from `state` at `times[0]`.

        Args:
            field: of a scalar time and the state, a tuple of tensors; returns their time derivatives.
            state: tensors of one floating dtype, at least float32.
            times: strictly increasing or decreasing, one-dimensional. All methods interpolate between their steps, fixed-step
                methods by cubic Hermite polynomials.
            evaluations: a counter to add to.
            parameters: tensors, besides the state and the times, that `gradient="adjoint"` differentiates in. Others that the
                field depends on at the start are found and added.
            record: filled with the steps, if the solver is `dense` and the state one tensor.
            accepted: filled with the times of the steps, if the solver is `adaptive`.
            size: of the finest details of the state at a time, which the tolerances follow; None for one.

        Returns:
            For each tensor of the state one of shape `(len(times), *its shape)`.

        Raises:
            SolverError: the solution blows up, is too stiff for the tolerance, or takes too many evaluations. Errors of an
                adjoint solve, as of a field that changed since the solve, come from `.backward()`.
        """
        evaluations = Evaluations() if evaluations is None else evaluations
        steps_alone = METHODS[self.method] >= FIXED and self.gradient == "direct"
        refuse_transforms(
            f"a solve by {self.method}, gradient={self.gradient!r},",
            "use a method of fixed steps, such as Solver('rk4'), or torch.autograd.grad of all samples as one batch",
            only_vmap=steps_alone,
        )
        if state[0].dtype in (torch.float16, torch.bfloat16):
            raise SolverError(f"a state of {state[0].dtype} is too coarse to integrate. Use float32, with autocast.")
        if sum(part.numel() for part in state) == 0:
            return tuple(part.new_zeros(len(times), *part.shape) for part in state)
        options = dict(self.options or {})
        times = after_jump(times, options.get("jump_t"))
        dtype = torch.promote_types(options.get("dtype", torch.float64), state[0].dtype)
        tolerances = Tolerances(self.rtol, self.atol, size if self.adaptive else None, state[0], dtype)
        monitor = _Monitor(field, self, evaluations, times, tolerances, record, accepted)
        prepared = self._options(times)
        keywords: dict[str, Any] = {"rtol": tolerances.rtol, "atol": tolerances.atol}
        keywords |= {"method": self.method, "options": prepared}
        single = len(state) == 1  # torchdiffeq copies tuples at every evaluation
        start = state[0] if single else state
        try:
            with unconverged_is_an_error():
                if self.gradient == "adjoint" and torch.is_grad_enabled():
                    keywords["adjoint_options"] = adjoint_options(options, prepared, times.detach())
                    solution = monitor.by_adjoint(start, times, parameters, keywords)
                else:
                    solution = odeint(monitor, start, times, **keywords)
        except AssertionError as error:
            if monitor.inside_field:
                raise
            if "strictly increasing" in str(error):
                raise SolverError(
                    f"times must be strictly increasing or decreasing, but are {[float(f'{t:.6g}') for t in times.tolist()]}. Sort "
                    "them, and leave out those that repeat."
                ) from error
            raise monitor.cause(str(error), start) from error
        except Unconverged as error:
            raise monitor.cause("the implicit step did not converge, which smaller steps may cure", start) from error
        solution = solution if isinstance(solution, tuple) else (solution,)
        monitor.begin_backward()
        if not _is_finite(solution):
            raise monitor.cause("the state became non-finite", start)
        if self.method == "scipy_solver" and self.gradient == "direct" and torch.is_grad_enabled():
            _refuse_scipy_gradients(state, times, parameters)
        return tuple(solution)

    def _options(self, times: Tensor) -> dict[str, Any]:
        options, times = self.options or {}, times.detach()
        if METHODS[self.method] >= FIXED:
            return fixed_options(self.method, options, times)
        return adaptive_options(self.method, options, times) if self.adaptive else dict(options)

    def finer(self, accepted: StepTimes, start: Tensor, end: Tensor) -> "Solver":
        """Return a solver that halves the steps which this one has taken, to estimate their error.

        Args:
            accepted: the steps, of an `adaptive` method.
            start: the first time.
            end: the last one.
        """
        options = dict(self.options or {})
        if self.adaptive:
            options |= {"step_t": accepted.halves(options.get("step_t")), "first_step": (end - start).abs().item()}
            options.pop("min_step", None)
        elif METHODS[self.method] >= FIXED:
            options["step_size"] = options.get("step_size", (end - start).abs().item() / DEFAULT_STEPS) / 2
        else:
            return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)
        return replace(self, gradient="direct", options=options, max_evaluations=10 * self.max_evaluations)


class _Monitor:
    """A field as torchdiffeq sees it: counted, capped, in the state's dtype, with its last step remembered."""

    def __init__(
        self,
        field: Callable,
        solver: Solver,
        evaluations: Evaluations,
        times: Tensor,
        tolerances: Tolerances,
        record: Steps | None,
        accepted: StepTimes | None,
    ) -> None:
        self._field, self._solver, self._evaluations, self._record = field, solver, evaluations, record
        self._times, self._tolerances, self._accepted = times.detach(), tolerances, accepted
        self._calls, self._backward = 0, False
        self._time: Tensor | None = None
        self._adjoint: Adjoint | None = None
        self.inside_field = False
        device = times.device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        if solver.method != "scipy_solver":  # it has no callbacks, and torchdiffeq warns about unknown ones
            self.callback_step = self._remember
            self.callback_step_adjoint = self._check_step
        if solver.adaptive and not (record is None and accepted is None):
            self.callback_accept_step = self._accept
        if record is not None:
            self.callback_reject_step = record.reject

    def by_adjoint(
        self, state: Tensor | State, times: Tensor, parameters: Sequence[Tensor], keywords: dict[str, Any]
    ) -> Tensor | State:
        """Return the solution, differentiable by its adjoint."""
        self._adjoint = Adjoint(
            self._evaluate, state, times[0], parameters, lambda what: SolverError(self.failure(what))
        )

        def run(state: Tensor | State, times: Tensor, differentiated: tuple[Tensor, ...]) -> Tensor | State:
            return odeint_adjoint(self, state, times, adjoint_params=differentiated, **keywords)

        return self._adjoint.solve(run, state, times)

    def __call__(self, t: Tensor, state: Tensor | State) -> Tensor | State:
        if self._adjoint is None:
            return self._evaluate(t, state)
        return self._adjoint.backward(t, state) if self._backward else self._adjoint.forward(t, state)

    def _evaluate(self, t: Tensor, state: Tensor | State) -> Tensor | State:
        self._calls += 1
        if self._calls > self._solver.max_evaluations:
            raise SolverError(self.failure(f"more than {self._solver.max_evaluations} evaluations were needed"))
        counter = "backward" if self._backward else "forward"
        setattr(self._evaluations, counter, getattr(self._evaluations, counter) + 1)
        self.inside_field = True
        # The adjoint runs inside .backward(), outside of the caller's autocast: enter it again.
        with torch.autocast(**self._autocast) if self._backward else contextlib.nullcontext():
            # Copies, because a velocity may write to its inputs, which the solver still needs.
            time, parts = t.clone(), tuple(part.clone() for part in (state if isinstance(state, tuple) else (state,)))
            found = self._field(time, parts)
            derivative = found if isinstance(state, tuple) else found[0]
        self.inside_field = False
        if self._backward and not _is_finite(derivative):
            # The norm of torchdiffeq's adjoint is a Python max, which loses a NaN and accepts the step.
            self._time = t.detach()
            raise SolverError(self.failure("the velocity became non-finite"))
        if self._record is not None:
            self._record.evaluated(derivative)
        return derivative

    def begin_backward(self) -> None:
        self._calls, self._backward = 0, True

    def failure(self, what: str) -> str:
        solver = self._solver
        by = f"method {solver.method}, rtol {solver.rtol:g}, atol {solver.atol:g}"
        return described(what, self._time, by, METHODS[solver.method] >= FIXED, self._backward and self._calls > 0)

    @torch.no_grad()
    def cause(self, what: str, state: Tensor | State) -> SolverError:
        """The error of a forward solve that failed: a velocity that is not finite at one of its ends, if that is the cause."""
        parts, (first, *_, last) = state if isinstance(state, tuple) else (state,), self._times
        finite = [
            (float(t), _is_finite(self._field(t.clone(), tuple(part.clone() for part in parts))))
            for t in (first, (first + last) / 2, last)
        ]
        return explained(SolverError(self.failure(what)), finite)

    def _accept(self, t: Tensor, state: Tensor, step: Tensor) -> None:
        if self._record is not None:
            self._record.accept(t, state, step)
        if self._accepted is not None:
            self._accepted.accept(t, step)

    @torch.no_grad()
    def _remember(self, t: Tensor, state: State, step: Tensor) -> None:
        """Before a step is taken: its time, for messages; its tolerance; and a length that torchdiffeq can cut."""
        self._time = t.detach()
        if self._solver.adaptive:
            limit_step(step, self._solver.options or {})
            self._tolerances.at(self._time)

    def _check_step(self, t: Tensor, state: State, step: Tensor) -> None:
        """What torchdiffeq asserts of a step; checked here because nobody can catch its error inside `.backward()`."""
        # Torchdiffeq negates the times of the adjoint if the solve went down in time.
        self._remember(torch.where(self._times[-1] < self._times[0], -t, t), state, step)
        if not t.abs() + step.abs() > t.abs():
            raise SolverError(self.failure(f"underflow in the step size {float(step):g}"))
        if not _is_finite(state):
            raise SolverError(self.failure("the state or its adjoint became non-finite"))


def _is_finite(state: Tensor | State) -> bool:
    parts = (state,) if isinstance(state, Tensor) else state
    return bool(torch.stack([torch.isfinite(part).all() for part in parts]).all())


def _refuse_scipy_gradients(state: State, times: Tensor, parameters: Sequence[Tensor]) -> None:
    if any(tensor.requires_grad for tensor in (*state, times, *parameters)):
        raise SolverError("scipy_solver has no gradients. Use it under torch.no_grad, or another method for training.")

"""Trajectories of dx/dt = v(t, x) by torchdiffeq, with typed errors, checked options and counted evaluations."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from divflow.adjoint import Adjoint
from divflow.arguments import check_count, check_positive
from divflow.dense_output import Steps
from divflow.errors import DivflowError

__all__ = ["Evaluations", "Solver", "SolverError"]

State = tuple[Tensor, ...]

_ADAPTIVE = frozenset(
    {"norm", "first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "step_t", "jump_t", "dtype"}
)
_FIXED = frozenset({"step_size", "perturb"})
_ADAMS = _FIXED | {"max_order"}
_IMPLICIT_ADAMS = _ADAMS | {"max_iters"}
_SCIPY = frozenset({"solver", "min_step", "max_step"})

METHODS: dict[str, frozenset[str]] = {
    "dopri5": _ADAPTIVE,
    "dopri8": _ADAPTIVE,
    "bosh3": _ADAPTIVE,
    "fehlberg2": _ADAPTIVE,
    "adaptive_heun": _ADAPTIVE,
    "euler": _FIXED,
    "midpoint": _FIXED,
    "heun2": _FIXED,
    "heun3": _FIXED,
    "rk4": _FIXED,
    "explicit_adams": _ADAMS,
    "implicit_adams": _IMPLICIT_ADAMS,
    "fixed_adams": _IMPLICIT_ADAMS,
    "scipy_solver": _SCIPY,
}
"""torchdiffeq's methods, and the options of each."""

_DEFAULT_STEPS = 32

# torchdiffeq interpolates every output, the last one included, by a quartic through the step's midpoint. For these
# methods that is far less accurate than the step itself (measured, tolerance 1e-5: bosh3 3e-3 against 5e-5, dopri8
# 7e-4 against 1e-6), so their steps end at all outputs; those of the others end at the last one, which is free.
_COARSELY_INTERPOLATED = frozenset({"dopri8", "bosh3", "fehlberg2"})


class SolverError(DivflowError, RuntimeError):
    """A trajectory could not be computed; the message says at which time, with which tolerance, and what to try."""


@dataclass
class Evaluations:
    """Numbers of field evaluations, counted as they happen.

    Attributes:
        forward: in solves from one end to the other.
        backward: in adjoint solves, run by `.backward()`; a direct gradient differentiates the recorded
            steps and evaluates nothing.
        divergence: evaluations of the divergence. At quadrature nodes they come on top of `forward`; in an
            augmented solve each of its evaluations is one of these, too.
    """

    forward: int = 0
    backward: int = 0
    divergence: int = 0


@dataclass(frozen=True)
class Solver:
    """How trajectories are computed.

    Args:
        method: one of torchdiffeq's. Adaptive: dopri5, dopri8, bosh3, fehlberg2, adaptive_heun. Fixed
            steps: euler, midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams, fixed_adams. Without
            gradients: scipy_solver.
        rtol: relative tolerance of adaptive methods, per step.
        atol: absolute tolerance, in units of the state.
        gradient: "direct" differentiates the steps taken (any order, memory grows with their number);
            "adjoint" solves backward in time (once differentiable, constant memory, and correct only to
            the tolerance), and evaluates the field again there, which must be the function that it was: one with
            dropout, or with a state, is refused. Tensors that it uses and that are no parameters are found.
        options: of the method; a fixed-step method takes `step_size` (default: the span / 32).
        max_evaluations: of the field, in one solve and again in its adjoint.

    Raises:
        ValueError: an unknown method, gradient or option, or a value out of range; with the valid ones.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: str = "direct"
    options: Mapping[str, Any] | None = None
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in list(METHODS):
            raise ValueError(f"unknown solver method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.gradient not in ("direct", "adjoint"):
            raise ValueError(f"gradient must be 'direct' or 'adjoint', but is {self.gradient!r}")
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping of names to values, but is {self.options!r}")
        valid = METHODS[self.method]
        unknown = sorted(set(self.options or ()) - valid)
        if unknown:
            raise ValueError(f"{self.method} has no option {', '.join(unknown)}; it takes {', '.join(sorted(valid))}")
        check_count("max_evaluations", self.max_evaluations)
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)
        check_positive("step_size", (self.options or {}).get("step_size", 1))

    @property
    def dense(self) -> bool:
        """Whether `solve` can record its steps, for the states at times that are chosen afterwards."""
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
    ) -> State:
        """The states at all `times`, starting from `state` at `times[0]`.

        Args:
            field: of a scalar time and the state, a tuple of tensors; returns their time derivatives.
            state: tensors of one floating dtype, float32 at least.
            times: strictly increasing or decreasing, one-dimensional. Adaptive methods interpolate between
                their steps, fixed-step methods likewise, by cubic Hermite polynomials.
            evaluations: a counter to add to.
            parameters: tensors, besides the state and the times, that `gradient="adjoint"` differentiates in; others
                that the field depends on at the start are found and added.
            record: filled with the steps, where the solver is `dense` and the state one tensor.

        Returns:
            For each tensor of the state one of shape `(len(times), *its shape)`.

        Raises:
            SolverError: the solution blows up, is too stiff for the tolerance, or takes too many
                evaluations; in an adjoint solve by `.backward()`, as of a field that changed since the solve.
        """
        evaluations = Evaluations() if evaluations is None else evaluations
        if state[0].dtype in (torch.float16, torch.bfloat16):
            raise SolverError(f"a state of {state[0].dtype} is too coarse to integrate; use float32, with autocast")
        if sum(part.numel() for part in state) == 0:
            return tuple(part.new_zeros(len(times), *part.shape) for part in state)
        monitor = _Monitor(field, self, evaluations, state[0].device, record)
        keywords = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": self._options(times)}
        single = len(state) == 1  # torchdiffeq copies tuples at every evaluation
        start = state[0] if single else state
        try:
            with _unconverged_is_an_error():
                if self.gradient == "adjoint" and torch.is_grad_enabled():
                    keywords["adjoint_options"] = self._adjoint_options(times)
                    solution = monitor.by_adjoint(start, times, parameters, keywords)
                else:
                    solution = odeint(monitor, start, times, **keywords)
        except AssertionError as error:
            if monitor.inside_field:
                raise
            raise SolverError(monitor.failure(str(error))) from error
        except _Unconverged as error:
            raise SolverError(monitor.failure("the implicit step did not converge; use smaller steps")) from error
        solution = solution if isinstance(solution, tuple) else (solution,)
        monitor.begin_backward()
        if not _is_finite(solution):
            raise SolverError(monitor.failure("the state became non-finite"))
        if self.method == "scipy_solver" and self.gradient == "direct" and torch.is_grad_enabled():
            _refuse_scipy_gradients(state, times, parameters)
        return tuple(solution)

    def _options(self, times: Tensor) -> dict[str, Any]:
        options, times = dict(self.options or {}), times.detach()
        if METHODS[self.method] >= _FIXED:
            step_size = options.pop("step_size", None)

            # A grid of our own, because a step_size that divides the span gains a step of length zero by rounding.
            def grid(_: object, __: object, t: Tensor) -> Tensor:
                steps = _DEFAULT_STEPS
                if step_size is not None or len(t) < len(times):  # an adjoint takes one interval after another
                    length = step_size or (times[-1].double() - times[0].double()).abs() / _DEFAULT_STEPS
                    steps = max(1, math.ceil(((t[-1] - t[0]).abs().double() / length).item() - 1e-6))
                inner = t[0] + (t[-1] - t[0]) * torch.arange(1, steps, dtype=t.dtype, device=t.device) / steps
                return torch.cat([t[:1], inner, t[-1:]])

            # Outputs are interpolated linearly by default, which would cost a method its order; and explicit Adams of
            # torchdiffeq's default order, 12, is unstable: on dx/dt = -x it ends with errors of many powers of ten.
            if self.method == "explicit_adams":
                options.setdefault("max_order", 4)
            options |= {"grid_constructor": grid, "interp": "cubic"}
        elif METHODS[self.method] == _ADAPTIVE:
            on_steps = times if self.method in _COARSELY_INTERPOLATED else times[:: max(1, len(times) - 1)]
            jumps, steps = (_as_times(options.get(name), times) for name in ("jump_t", "step_t"))
            options |= {"step_t": _distinct(steps, on_steps, jumps), "jump_t": jumps}
            # torchdiffeq's own guess costs an evaluation and mostly a few steps that are far too small; one step over
            # the whole span is rejected once or twice where it is too long (measured on trained flows: 31 evaluations
            # either way; on smooth ones 7 instead of 20), and no evaluation lies outside of the span.
            options.setdefault("first_step", (times[-1].double() - times[0].double()).abs())
        return options

    def _adjoint_options(self, times: Tensor) -> dict[str, Any]:
        """The options of the backward solve, for which torchdiffeq negates a decreasing time but not its options."""
        options = self._options(times)
        options.pop("norm", None)
        if "step_t" in options:
            sign, jumps = (times[-1] - times[0]).detach().sign(), options["jump_t"]
            steps = _as_times((self.options or {}).get("step_t"), times)
            options |= {"step_t": sign * _distinct(steps, times.detach(), jumps), "jump_t": sign * jumps}
        return options


def _as_times(values: Any, times: Tensor) -> Tensor:
    return times[:0].detach() if values is None else torch.as_tensor(values, dtype=times.dtype, device=times.device)


def _distinct(steps: Tensor, outputs: Tensor, jumps: Tensor) -> Tensor:
    """The times to end steps at, increasing, none of them twice or a jump."""
    if not (len(steps) or len(jumps)):
        return outputs.sort().values  # which, other than `unique`, the host need not wait for
    steps = torch.cat([steps, outputs]).unique()
    return steps[~torch.isin(steps, jumps)]


class _Monitor:
    """A field as torchdiffeq sees it: counted, capped, in the state's dtype, its last step remembered."""

    def __init__(
        self, field: Callable, solver: Solver, evaluations: Evaluations, device: torch.device, record: Steps | None
    ) -> None:
        self._field, self._solver, self._evaluations, self._record = field, solver, evaluations, record
        self._calls, self._backward = 0, False
        self._time: Tensor | None = None
        self._adjoint: Adjoint | None = None
        self.inside_field = False
        self._autocast: dict[str, Any] = {
            "device_type": device.type,
            "dtype": torch.get_autocast_dtype(device.type),
            "enabled": torch.is_autocast_enabled(device.type),
        }
        if solver.method != "scipy_solver":  # it has no callbacks, and torchdiffeq warns of those it does not know
            self.callback_step = self._remember
            self.callback_step_adjoint = self._check_step
        if record is not None:
            self.callback_accept_step = record.accept
            self.callback_reject_step = record.reject

    def by_adjoint(
        self, state: Tensor | State, times: Tensor, parameters: Sequence[Tensor], keywords: dict[str, Any]
    ) -> Tensor | State:
        """The solution, differentiable by its adjoint."""
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
            derivative = self._field(t, state) if isinstance(state, tuple) else self._field(t, (state,))[0]
        self.inside_field = False
        if self._backward and not _is_finite(derivative):
            # The norm of torchdiffeq's adjoint is a Python max, in which a NaN is lost and the step accepted.
            self._time = t.detach()
            raise SolverError(self.failure("the velocity became non-finite"))
        if self._record is not None:
            self._record.evaluated(derivative)
        return derivative

    def begin_backward(self) -> None:
        self._calls, self._backward = 0, True

    def failure(self, what: str) -> str:
        solver = self._solver
        where = "" if self._time is None else f" at t = {float(self._time):.6g}"
        return (
            f"the {'adjoint ' if self._backward and self._calls else ''}solve failed{where}: {what} (method {solver.method}, "
            f"rtol {solver.rtol:g}, atol {solver.atol:g}). Try a looser tolerance or a smaller learning rate if the field is "
            "stiff, a larger max_evaluations or a fixed-step method if it is merely costly, and gradient clipping, "
            "smooth activations or scaled data if it blows up"
        )

    @torch.no_grad()
    def _remember(self, t: Tensor, state: State, step: Tensor) -> None:
        """Before a step is taken: its time, for messages; and a length that torchdiffeq can cut.

        A step that by itself ends exactly where it shall (of two equal intervals, the second) makes torchdiffeq (0.2.5)
        overlook all later ends: it would step over them, interpolate coarsely, and evaluate beyond the last one.
        """
        self._time = t.detach()
        if METHODS[self._solver.method] == _ADAPTIVE:
            step.mul_(1 + 1e-12)

    def _check_step(self, t: Tensor, state: State, step: Tensor) -> None:
        """What torchdiffeq asserts of a step; here because no one can catch it inside `.backward()`."""
        self._remember(t, state, step)
        if not t.abs() + step.abs() > t.abs():
            raise SolverError(self.failure(f"underflow in the step size {float(step):g}"))
        if not _is_finite(state):
            raise SolverError(self.failure("the state or its adjoint became non-finite"))


class _Unconverged(UserWarning):
    """What torchdiffeq only warns of: "Functional iteration did not converge. Solution may be incorrect."."""


@contextlib.contextmanager
def _unconverged_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Functional iteration did not converge")
        try:
            yield
        except UserWarning as warning:
            if "Functional iteration" not in str(warning):
                raise
            raise _Unconverged(str(warning)) from warning


def _is_finite(state: Tensor | State) -> bool:
    parts = (state,) if isinstance(state, Tensor) else state
    return bool(torch.stack([torch.isfinite(part).all() for part in parts]).all())


def _refuse_scipy_gradients(state: State, times: Tensor, parameters: Sequence[Tensor]) -> None:
    if any(tensor.requires_grad for tensor in (*state, times, *parameters)):
        raise SolverError("scipy_solver has no gradients: use it under torch.no_grad, or another method to train")

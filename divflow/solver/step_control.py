"""How torchdiffeq's methods choose their steps: the options of each, checked, and the tolerance of a step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from divflow.errors import check_count, check_positive
from divflow.solver.norms import of_parts, worst_sample

__all__ = [
    "ADAPTIVE",
    "COARSELY_INTERPOLATED",
    "DEFAULT_STEPS",
    "FIXED",
    "METHODS",
    "METHOD_ORDERS",
    "StepTimes",
    "Tolerances",
    "adaptive_options",
    "adjoint_options",
    "after_jump",
    "check_options",
    "fixed_options",
    "limit_step",
    "plain_options",
    "steps_for_one",
]

ADAPTIVE = frozenset(
    {"norm", "first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "step_t", "jump_t", "dtype"}
)
FIXED = frozenset({"step_size", "perturb"})
_ADAMS = FIXED | {"max_order"}
_IMPLICIT_ADAMS = _ADAMS | {"max_iters"}
_SCIPY = frozenset({"solver", "min_step", "max_step"})

METHODS: dict[str, frozenset[str]] = {
    "dopri5": ADAPTIVE,
    "dopri8": ADAPTIVE,
    "bosh3": ADAPTIVE,
    "fehlberg2": ADAPTIVE,
    "adaptive_heun": ADAPTIVE,
    "euler": FIXED,
    "midpoint": FIXED,
    "heun2": FIXED,
    "heun3": FIXED,
    "rk4": FIXED,
    "explicit_adams": _ADAMS,
    "implicit_adams": _IMPLICIT_ADAMS,
    "fixed_adams": _IMPLICIT_ADAMS,
    "scipy_solver": _SCIPY,
}
"""torchdiffeq's methods, and the options of each."""

METHOD_ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "adaptive_heun": 2,
    "fehlberg2": 2,
    "heun3": 3,
    "bosh3": 3,
    "rk4": 4,
}
"""Orders of the methods whose order is below five."""

# torchdiffeq interpolates every output, including the last one, by a quartic through the step's midpoint. For these
# methods that is far less accurate than the step itself (measured, tolerance 1e-5: bosh3 3e-3 against 5e-5, dopri8
# 7e-4 against 1e-6), so their steps end at all outputs. The steps of the others end at the last one, which is free.
COARSELY_INTERPOLATED = frozenset({"dopri8", "bosh3", "fehlberg2"})

# How many steps a method of low order takes for one of dopri5: c / tolerance^(1 / order - 1 / 5), measured (order and c) on
# oscillating velocities at tolerances of 1e-2 to 1e-5. Its steps follow its own error more than the velocity, as do those
# of all methods at tolerances below this one.
_STEPS_FOR_ONE = {"bosh3": (3, 1.3), "fehlberg2": (2, 0.13), "adaptive_heun": (2, 2.3)}
_USUAL_TOLERANCE = 1e-5

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

DEFAULT_STEPS = 32
"""Steps of a fixed-step method without a step size."""


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options that are None, and convert the name of a dtype to torch's own."""
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(name := given.get("dtype"), str):
        given["dtype"] = _DTYPES.get(name.removeprefix("torch."), name)
    return given


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have, and invalid values.

    Args:
        method: the name of the method.
        options: of the method, by name.

    Raises:
        ValueError: with the option, and the valid ones.
    """
    valid = METHODS[method]
    unknown = sorted(set(options) - valid)
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}. It takes {', '.join(sorted(valid))}.")
    for name in ("step_size", "first_step", "max_step", "safety", "ifactor", "dfactor"):
        value = options.get(name, 1)
        if not (name == "max_step" and value == math.inf):
            check_positive(name, value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
    least, most = options.get("min_step", 0), options.get("max_step", math.inf)
    if isinstance(least, str) or not 0 <= least <= most:
        raise ValueError(f"need 0 <= min_step <= max_step, but min_step is {least!r} and max_step {most!r}")
    if options.get("dfactor", 0.2) > 1 or options.get("ifactor", 10.0) < 1 or options.get("safety", 0.9) > 1:
        raise ValueError(
            "need dfactor <= 1 (by which a rejected step shrinks), ifactor >= 1 (by which an accepted one may grow) and "
            f"safety <= 1, but got {dict(options)!r}"
        )
    for name in ("max_order", "max_iters"):
        check_count(name, options.get(name, 1))
    if not callable(options.get("norm", abs)):
        raise ValueError(f"norm must be a function of the errors of a step, but is {options['norm']!r}")
    for name in ("step_t", "jump_t"):
        if name in options and not _finite(options[name]):
            raise ValueError(f"{name} must be finite times, but is {options[name]!r}")
    if options.get("dtype", torch.float64) not in _DTYPES.values():
        raise ValueError(f"dtype, the precision of times, must be float64 or float32, but is {options['dtype']!r}")


def _finite(times: Any) -> bool:
    try:
        tensor = times if isinstance(times, Tensor) else torch.as_tensor(times, device="cpu")
        return not tensor.is_complex() and bool(tensor.isfinite().all())
    except (TypeError, ValueError, RuntimeError):  # not numbers
        return False


def fixed_options(method: str, options: Mapping[str, Any], times: Tensor) -> dict[str, Any]:
    """Make torchdiffeq's options for a grid of equal steps, with outputs between them by cubic Hermite polynomials.

    Args:
        method: the name of the method.
        options: the user's.
        times: of all outputs.
    """
    options = dict(options)
    step_size = options.pop("step_size", None)

    # Our own grid, because rounding adds a step of length zero to a step_size that divides the span.
    def grid(_: object, __: object, t: Tensor) -> Tensor:
        steps = DEFAULT_STEPS
        if step_size is not None or len(t) < len(times):  # an adjoint takes one interval after another
            length = step_size or (times[-1].double() - times[0].double()).abs() / DEFAULT_STEPS
            steps = max(1, math.ceil(((t[-1] - t[0]).abs().double() / length).item() - 1e-6))
        inner = t[0] + (t[-1] - t[0]) * torch.arange(1, steps, dtype=t.dtype, device=t.device) / steps
        return torch.cat([t[:1], inner, t[-1:]])

    # By default outputs are interpolated linearly, which would cost a method its order; and explicit Adams of
    # torchdiffeq's default order, 12, is unstable: on dx/dt = -x its errors reach many powers of ten.
    if method == "explicit_adams":
        options.setdefault("max_order", 4)
    return options | {"grid_constructor": grid, "interp": "cubic"}


def adaptive_options(method: str, options: Mapping[str, Any], times: Tensor) -> dict[str, Any]:
    """Make torchdiffeq's options, with steps that end at the outputs that need it, and at none twice.

    Args:
        method: the name of the method.
        options: the user's.
        times: of all outputs.
    """
    options = dict(options)
    on_steps = times if method in COARSELY_INTERPOLATED else times[:: max(1, len(times) - 1)]
    jumps, steps = (as_times(options.get(name), times) for name in ("jump_t", "step_t"))
    options |= {"step_t": _distinct(steps, on_steps, jumps), "jump_t": jumps}
    # torchdiffeq's own guess costs an evaluation and usually a few steps that are far too small. One step over the
    # whole span is rejected once or twice if it is too long (measured on trained flows: 31 evaluations either way; on
    # smooth ones 7 instead of 20), and no evaluation lies outside of the span.
    options.setdefault("first_step", (times[-1].double() - times[0].double()).abs())
    options.pop("max_step", None)  # enforced by `limit_step`
    if options.get("min_step"):
        options["min_step"] *= 1 + _SHORTEST
    options["norm"] = of_parts(options["norm"]) if "norm" in options else worst_sample
    return options


def adjoint_options(options: Mapping[str, Any], prepared: Mapping[str, Any], times: Tensor) -> dict[str, Any]:
    """Make the options of the backward solve, for which torchdiffeq negates decreasing times but not its options.

    Args:
        options: the user's.
        prepared: those of the forward solve.
        times: of all outputs, at each of which an adjoint starts again.
    """
    adjoint = dict(prepared)
    adjoint.pop("norm", None)  # torchdiffeq applies the state's norm to the state and to its adjoint, each by itself
    if "step_t" in adjoint:
        sign, jumps = (times[-1] - times[0]).sign(), adjoint["jump_t"]
        steps = as_times(options.get("step_t"), times)
        adjoint |= {"step_t": sign * _distinct(steps, times, jumps), "jump_t": sign * jumps}
    return adjoint


# Factor on torchdiffeq's smallest step, so that a step of this length, which `limit_step` shortens a little, is taken
# whatever its error.
_SHORTEST = 1e-6


def limit_step(step: Tensor, options: Mapping[str, Any]) -> None:
    """Change a proposed step, in place, into one that is not too long and that torchdiffeq can cut.

    A step that ends exactly at a wanted time by itself (the second of two equal intervals) makes torchdiffeq (0.2.5)
    overlook all later ends: it would step over them, interpolate coarsely, and evaluate beyond the last one. And it would
    refuse for ever a step of exactly the largest length that was made longer by this much. So the largest one is enforced
    here.

    Args:
        step: the proposed one.
        options: the user's.
    """
    if options.get("max_step") is not None:
        step.clamp_(max=float(options["max_step"]))
    longer = 1 + max(1e-12, 4 * torch.finfo(step.dtype).eps)
    if options.get("min_step"):
        shortest = step <= float(options["min_step"]) * (1 + 2 * _SHORTEST)
        step.mul_(torch.where(shortest, 2 - longer - _SHORTEST / 2, longer))
    else:
        step.mul_(longer)


def as_times(values: Any, times: Tensor) -> Tensor:
    """Return the times of an option, one-dimensional, each once, in `times`' dtype."""
    if values is None:
        return times[:0].detach()
    return torch.as_tensor(values, dtype=times.dtype, device=times.device).detach().reshape(-1).unique()


def after_jump(times: Tensor, jumps: Any) -> Tensor:
    """Return the times of a solve; if the velocity jumps at the first, it moves to the side that the solve goes to."""
    if jumps is None or len(times) < 2:
        return times
    first = times[0].detach()
    # A jump in single precision may be slightly off.
    at_jump = torch.isclose(as_times(jumps, times), first, rtol=1e-7, atol=0).any()
    start = torch.where(at_jump, torch.nextafter(first, times[-1].detach()) - first, 0)
    return torch.cat([times[:1] + start, times[1:]])


def _distinct(steps: Tensor, outputs: Tensor, jumps: Tensor) -> Tensor:
    """The times to end steps at, increasing, each once and none a jump."""
    if not (len(steps) or len(jumps)):
        return outputs.sort().values  # the host need not wait for it, unlike for `unique`
    steps = torch.cat([steps, outputs]).unique()
    return steps[~torch.isin(steps, jumps)]


class Tolerances:
    """Tolerances that follow the size of a state's finest details in time; torchdiffeq reads them at every step.

    Args:
        rtol: relative, of a state of size one or larger.
        atol: absolute, likewise.
        size: of the state's finest details at a time, a positive number; None for one at all times.
        state: one part of the state, for its dtype and device.
        dtype: of times.
    """

    def __init__(
        self, rtol: float, atol: float, size: Callable[[Tensor], Tensor] | None, state: Tensor, dtype: torch.dtype
    ) -> None:
        self._given, self._size = (rtol, atol), size
        self.rtol: float | Tensor = rtol
        self.atol: float | Tensor = atol
        if size is not None:
            # Rounding at every evaluation looks like an error, so tolerances stay above it.
            self._least = min(rtol, 4 * torch.finfo(state.dtype).eps)
            # The tensors that torchdiffeq keeps, because they already have the dtype and device that it would convert to.
            self._sized = [torch.full((), given, dtype=dtype, device=state.device) for given in self._given]
            self.rtol, self.atol = self._sized

    @torch.no_grad()
    def at(self, t: Tensor) -> None:
        """Set the tolerances of the step that begins at t."""
        if self._size is not None:
            size = self._size(t).clamp(max=1).to(self._sized[0])
            for tolerance, given, least in zip(self._sized, self._given, (self._least, 0.0), strict=True):
                tolerance.copy_((given * size).clamp(min=least))


def steps_for_one(method: str, rtol: float) -> float:
    """How many steps of an adaptive method resolve a velocity as well as one of dopri5 at a tolerance of 1e-5.

    Args:
        method: the name of the method.
        rtol: its relative tolerance.
    """
    order, factor = _STEPS_FOR_ONE.get(method, (8 if method == "dopri8" else 5, 1.0))
    usual = max(rtol, _USUAL_TOLERANCE)
    of_order = factor / usual ** (1 / order - 1 / 5) if order < 5 else 1.0
    return max(1.0, of_order) * (usual / rtol) ** (1 / order)


class StepTimes:
    """When the accepted steps of a solve began, and their lengths.

    Args:
        start: the first time.
        end: the last one.
    """

    def __init__(self, start: Tensor, end: Tensor) -> None:
        self._start, self._end = start.detach().double(), end.detach().double()
        self._begun: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._middles: list[float] | None = None

    def __len__(self) -> int:
        return len(self._begun)

    def accept(self, time: Tensor, length: Tensor) -> None:
        """Note a step, of a positive length whatever the direction."""
        self._begun.append(time.detach())
        self._lengths.append(length.detach())

    def halves(self, times: Any = None) -> Tensor:
        """The times at which steps began, those of their middles, and some others."""
        begun, middles = self._times()
        others = begun[:0] if times is None else torch.as_tensor(times, dtype=begun.dtype, device=begun.device)
        return torch.cat([begun, middles, others.reshape(-1)])

    def middles(self) -> list[float]:
        """The middles of the steps as fractions of the way from start to end; the host waits for them once."""
        if self._middles is None:
            self._middles = ((self._times()[1] - self._start) / (self._end - self._start)).tolist()
        return self._middles

    def within(self, low: float, high: float) -> int:
        """How many steps have their middles between two fractions of the way."""
        if (low, high) == (0.0, 1.0):
            return len(self)
        return sum(low <= middle < high for middle in self.middles())

    def _times(self) -> tuple[Tensor, Tensor]:
        begun, lengths = torch.stack(self._begun).double(), torch.stack(self._lengths).double()
        return begun, begun + (self._end - self._start).sign() * lengths / 2

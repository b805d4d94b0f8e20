"""Stiff, exploding and discontinuous velocities: the right number within its error, or a typed error within the cap."""

import math

import pytest
import torch
from covering import covered

from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Solver

_CAP = 500


class _Counted:
    """A velocity, and how often it was evaluated in solves."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, 0

    def __call__(self, t, x):
        self.calls += 1
        return self.velocity(t, x)


def _normal(z):
    return -(z**2 + math.log(2 * math.pi)) / 2


def _nan_after(t, x):
    return torch.where(torch.as_tensor(t > 0.6).reshape(-1, 1), math.nan, -x)


# dx/dt, a state at t = 1, and log p there by the closed form of x(0); None where there is no solution, or no number.
VELOCITIES = {
    "stiff": (lambda t, x: -1e6 * x, 0.5, None),
    "moderately stiff": (lambda t, x: -50 * (x - 1), 1.0, _normal(1.0) + 50),
    "explodes": (lambda t, x: -(x**2), 2.0, None),  # backwards from 2 it is infinite after half of the way
    "explodes by exp": (lambda t, x: -torch.exp(3 * x), 2.0, None),
    "square": (lambda t, x: x**2, 0.5, _normal(0.5 / 1.5) - 2 * math.log(1.5)),
    "sign": (lambda t, x: torch.sign(x), 2.0, _normal(1.0)),
    "step in t": (lambda t, x: torch.where(torch.as_tensor(t > 0.37).reshape(-1, 1), x, -x), 1.0, _normal(math.exp(-0.26)) - 0.26),
    "NaN after some t": (_nan_after, 1.0, None),
    "NaN": (lambda t, x: x * math.nan, 1.0, None),
    "infinite": (lambda t, x: x / 0.0, 1.0, None),
}  # fmt: skip


@covered(
    name=VELOCITIES,
    method=["dopri5", "dopri8", "rk4"],
    likelihood=[Quadrature(), Quadrature(tolerance=1e-3), Augmented()],
)
def test_log_prob(name, method, likelihood):
    velocity, start, expected = VELOCITIES[name]
    counted = _Counted(velocity)
    flow = ContinuousFlow(counted, 1, solver=Solver(method, max_evaluations=_CAP), likelihood=likelihood)
    x = torch.full((2, 1), start, dtype=torch.float64)
    try:
        result = flow.double().evaluate(x)
    except DivflowError:
        assert counted.calls <= _most_calls(likelihood)
        return
    assert result.evaluations.forward <= _most_calls(likelihood)
    assert expected is not None, f"log_prob {result.log_prob.tolist()} of what has no solution"
    covered = 0.0 if result.quadrature_error is None else result.quadrature_error
    if method == "rk4" and name in ("moderately stiff", "step in t"):
        return  # fixed steps have no control of their own
    assert ((result.log_prob - expected).abs() <= 2e-3 + 2 * covered).all()


def _most_calls(likelihood):
    """A solve, one more for each refinement, and the nodes of all intervals."""
    return _CAP + 20 if getattr(likelihood, "tolerance", None) is None else 7 * _CAP + 64 * 2 * 15


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("name", ["explodes", "explodes by exp", "NaN after some t", "NaN", "infinite"])
def test_sample_of_what_has_no_solution(name, method):
    velocity, _, _ = VELOCITIES[name]
    # Forward in time these explode for states of the other sign.
    counted = _Counted(lambda t, x: velocity(t, x) if "NaN" in name else -10 * velocity(t, x.abs()))
    flow = ContinuousFlow(counted, 1, solver=Solver(method, max_evaluations=_CAP))
    with pytest.raises(DivflowError, match=r"(?s)t = |non-finite|evaluations"):
        flow.sample(20, generator=torch.Generator().manual_seed(0))
    assert counted.calls <= _CAP

import math
import re

import pytest
import torch
from torch import nn
from torchdiffeq._impl.odeint import SOLVERS

from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import METHODS, Evaluations, Solver, SolverError


class Decay(nn.Module):
    """dx/dt = -rate(t) x, rate = 1 + cos(t); x(t) = x(0) exp(-(t + sin t))."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t, state):
        return (-(self.rate + torch.cos(t)) * state[0],)


def exact(x, t0, t1):
    return x * math.exp(-(t1 + math.sin(t1) - t0 - math.sin(t0)))


def test_offers_all_methods_of_torchdiffeq():
    assert set(METHODS) == set(SOLVERS)


# Relative errors of 32 steps, by order, and of a second-order method at a tolerance of 1e-6; the others run at 1e-8.
COARSE = {"euler": 0.1, "heun2": 5e-3, "midpoint": 5e-3, "heun3": 1e-4, "explicit_adams": 1e-3, "adaptive_heun": 1e-4}


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_output_in_both_directions(method, direction):
    x = torch.randn(3, 2, dtype=torch.float64)
    times = torch.tensor([0.0, 0.1, 0.55, 0.9, 1.3], dtype=torch.float64)
    times = times if direction == 1 else times.flip(0)
    tolerance = 1e-6 if method == "adaptive_heun" else 1e-8
    with torch.no_grad():
        (states,) = Solver(method, tolerance, tolerance, max_evaluations=100_000).solve(Decay(), (x,), times)
    for t, state in zip(times.tolist(), states, strict=True):
        torch.testing.assert_close(state, exact(x, float(times[0]), t), rtol=COARSE.get(method, 1e-5), atol=0)


@pytest.mark.parametrize("speed", range(10, 18))
def test_steps_end_at_equally_spaced_outputs(speed):
    """Where one step is as long as the next interval, too: there torchdiffeq by itself overlooks all later outputs."""
    evaluated = []

    def field(t, state):
        evaluated.append(t.item())
        return (speed * torch.cos(speed * t) * torch.ones_like(state[0]),)

    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    (states,) = Solver("dopri8", 1e-6, 1e-6).solve(field, (torch.zeros(1, 1, dtype=torch.float64),), times)
    torch.testing.assert_close(states[:, 0, 0], torch.sin(speed * times), rtol=0, atol=1e-7)
    assert max(evaluated) <= 1


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)])
def test_fixed_steps_keep_their_order_at_interpolated_outputs(method, order):
    x, times = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, 0.637, 1.0], dtype=torch.float64)

    def errors(step):
        with torch.no_grad():
            (states,) = Solver(method, options={"step_size": step}).solve(Decay(), (x,), times)
        return [abs(state.item() - exact(1.0, 0.0, t.item())) for t, state in zip(times[1:], states[1:], strict=True)]

    for coarse, fine in zip(errors(1 / 10), errors(1 / 40), strict=True):
        measured = math.log(coarse / fine, 4)
        assert order - 0.4 < measured < order + 0.8


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_outputs_are_as_accurate_as_the_steps(method):
    """dopri8's and bosh3's own interpolation would miss by a hundred times the tolerance, the last output included."""
    x, times = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, 0.2, 0.637, 1.0], dtype=torch.float64)
    with torch.no_grad():
        (states,) = Solver(method, rtol=1e-6, atol=1e-6).solve(Decay(), (x,), times)
    for t, state in zip(times, states, strict=True):
        assert abs(state.item() - exact(1.0, 0.0, t.item())) < 2e-6


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("direction", [1, -1])
def test_gradients_in_state_parameters_and_times(method, gradient, direction):
    field = Decay()
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0.2, 1.1] if direction == 1 else [1.1, 0.2], dtype=torch.float64, requires_grad=True)
    times = torch.stack([ends[0], (ends[0] + ends[1]) / 2, ends[1]])
    solver = Solver(
        method, rtol=1e-9, atol=1e-9, gradient=gradient, options={"step_size": 0.01} if method == "rk4" else None
    )
    evaluations = Evaluations()
    (states,) = solver.solve(field, (x,), times, evaluations=evaluations, parameters=list(field.parameters()))
    value, d_x, d_rate, d_ends = states[-1], *torch.autograd.grad(states[-1].sum(), (x, field.rate, ends))
    t0, t1 = ends.tolist()
    torch.testing.assert_close(d_x, value.detach() / x.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(d_rate, -(t1 - t0) * value.sum().detach(), rtol=1e-6, atol=1e-7)
    slopes = torch.tensor([1 + math.cos(t0), -(1 + math.cos(t1))], dtype=torch.float64)
    torch.testing.assert_close(d_ends, slopes * value.sum().detach(), rtol=1e-6, atol=1e-6)
    assert (evaluations.backward > 0) == (gradient == "adjoint")


def test_evaluations_are_the_calls_of_the_field():
    calls = {"forward": 0, "backward": 0}
    phase = "forward"

    class Counted(Decay):
        def forward(self, t, state):
            calls[phase] += 1
            return super().forward(t, state)

    field, evaluations = Counted(), Evaluations()
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    (states,) = Solver(gradient="adjoint").solve(field, (x,), times, evaluations=evaluations, parameters=[field.rate])
    phase = "backward"
    states.sum().backward()
    assert (evaluations.forward, evaluations.backward) == (calls["forward"], calls["backward"])
    assert calls["backward"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dopri"}, "'dopri'.*dopri5.*rk4"),
        ({"gradient": "backprop"}, "direct.*adjoint.*'backprop'"),
        ({"options": {"stepsize": 0.1}, "method": "rk4"}, "rk4 has no option stepsize.*step_size"),
        ({"options": {"step_size": 0.1}}, "dopri5 has no option step_size.*first_step"),
        ({"options": {"step_size": 0.0}, "method": "rk4"}, "step_size.*0"),
        ({"rtol": 0.0}, "rtol.*0"),
        ({"atol": float("nan")}, "atol.*nan"),
        ({"max_evaluations": 0}, "max_evaluations.*0"),
    ],
)
def test_settings_are_checked_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Solver(**arguments)


TIMES = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "implicit_adams"])
def test_nan_ends_with_a_solver_error(method):
    with pytest.raises(SolverError, match="not finite at t = 0, t = 0.5, t = 1. Look for NaN"):
        Solver(method).solve(lambda t, s: (s[0] * float("nan"),), (torch.ones(2, 2),), TIMES)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("times", [[0.0, 0.5, 0.5, 1.0], [1.0, 1.0], [0.0, 1.0, 0.5]])
def test_times_that_repeat_are_named(method, times):
    with pytest.raises(SolverError, match=rf"strictly.*{re.escape(str(times))}.*leave out those that repeat"):
        Solver(method).solve(lambda t, s: (-s[0],), (torch.ones(2, 2),), torch.tensor(times))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
def test_a_velocity_that_an_end_has_no_value_of_names_the_time(method):
    x = torch.ones(2, 2)
    forward = ContinuousFlow(lambda t, x: -x / (1 - t.reshape(-1, 1)), 2, solver=Solver(method))
    with pytest.raises(SolverError, match=r"not finite at t = 1, the flow's t_data.*by t_data=0\.999"):
        forward.log_prob(x)
    back = ContinuousFlow(lambda t, x: -x / (2 - t.reshape(-1, 1)), 2, solver=Solver(method), t_base=2.0, t_data=-1.0)
    with pytest.raises(SolverError, match=r"the flow's t_base.*by t_base=1\.997"):
        back.sample(3)
    ContinuousFlow(forward.velocity, 2, solver=Solver(method), t_data=0.999).log_prob(x)


@pytest.mark.parametrize("likelihood", [Quadrature(), Augmented()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_density_that_long_steps_have_lost_is_an_error(likelihood, dtype):
    """Of dx/dt = -rate x steps of rk4 are unstable where rate / 32 > 2.8: the state shall vanish, and grows beyond all bounds."""
    rate = 150.0 if dtype == torch.float32 else 3000.0
    flow = ContinuousFlow(
        lambda t, x: -rate * x, 2, solver=Solver("rk4"), likelihood=likelihood, t_base=1.0, t_data=0.0
    )
    x = torch.randn(3, 2, dtype=dtype)
    with torch.no_grad(), pytest.raises(SolverError, match=r"grows from.*rk4.*smaller step_size"):
        flow.log_prob(x)
    outlier = torch.full((1, 2), 1e25 if dtype == torch.float32 else 1e160, dtype=dtype)
    still = ContinuousFlow(lambda t, x: 0 * x, 2, solver=Solver("rk4"), likelihood=likelihood)
    assert still.log_prob(outlier).item() == -math.inf


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_blow_up_ends_with_a_solver_error(method):
    """dx/dt = x^2 from 2 explodes at t = 0.5."""
    with pytest.raises(SolverError, match="t = "):
        Solver(method).solve(lambda t, s: (s[0] ** 2,), (torch.full((1, 1), 2.0),), TIMES)


def test_error_says_when_it_happened():
    with pytest.raises(SolverError) as caught:
        Solver().solve(lambda t, s: (s[0] ** 2,), (torch.full((1, 1), 2.0),), TIMES)
    time = float(str(caught.value).split("t = ")[1].split(":")[0])
    assert abs(time - 0.5) < 0.01


def test_too_many_evaluations():
    with pytest.raises(SolverError, match="more than 50 evaluations"):
        Solver(rtol=1e-9, atol=1e-9, max_evaluations=50).solve(
            lambda t, s: (torch.sin(200 * t) * s[0],), (torch.ones(1, 1),), TIMES
        )


def test_adjoint_failures_are_solver_errors():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))
            self.broken = False

        def forward(self, t, state):
            return (self.a * state[0] * (float("nan") if self.broken else 1.0),)

    for solver in (Solver(gradient="adjoint"), Solver(gradient="adjoint", max_evaluations=20)):
        field = Field()
        (states,) = solver.solve(field, (torch.ones(1, 1),), TIMES, parameters=[field.a])
        field.broken = True
        with pytest.raises(SolverError, match="adjoint"):
            states.sum().backward()


def test_adjoint_refuses_second_derivatives():
    field, x = Decay(), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    (states,) = Solver(gradient="adjoint").solve(field, (x,), TIMES.double(), parameters=[field.rate])
    with pytest.raises(SolverError, match="once only.*direct"):
        torch.autograd.grad(states.sum(), x, create_graph=True)


def test_scipy_refuses_gradients():
    x = torch.ones(1, 1, requires_grad=True)
    with pytest.raises(SolverError, match="no gradients"):
        Solver("scipy_solver").solve(lambda t, s: (-s[0],), (x,), TIMES)


def test_half_precision_is_refused():
    with pytest.raises(SolverError, match="bfloat16.*autocast"):
        Solver().solve(lambda t, s: (-s[0],), (torch.ones(1, 1, dtype=torch.bfloat16),), TIMES)


def test_assertions_of_the_users_own_field_pass():
    def field(t, state):
        assert t < 0.5, "mine"
        return (state[0],)

    with pytest.raises(AssertionError, match="mine"):
        Solver().solve(field, (torch.ones(1, 1),), TIMES)


def test_empty_batch():
    (states,) = Solver().solve(lambda t, s: (s[0],), (torch.ones(0, 3),), TIMES)
    assert states.shape == (2, 0, 3)


def test_steps_and_jumps_of_the_user_are_kept():
    """A velocity that jumps at t = 0.3: with the jump announced, few evaluations and full accuracy."""
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def field(t, state):
        return (torch.where(t < 0.3, -1.0, 2.0) * torch.ones_like(state[0]),)

    evaluations = Evaluations()
    solver = Solver(rtol=1e-9, atol=1e-9, options={"jump_t": [0.3]})
    (states,) = solver.solve(field, (torch.zeros(1, 1, dtype=torch.float64),), times, evaluations=evaluations)
    assert abs(states[-1].item() - (-0.3 + 1.4)) < 1e-8
    assert evaluations.forward < 40

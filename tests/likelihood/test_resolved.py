"""Quadrature that sees what the solver saw: jumps that are named, layers and oscillations that its nodes miss."""

import math

import pytest
import torch
from covering import alternated
from torch import nn

from divflow.divergence import Hutchinson
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.likelihood.pieces import Piece
from divflow.solver import Solver, SolverError
from divflow.solver.step_control import StepTimes

NESTED = Quadrature(tolerance=1e-3)


def rate_flow(rate, dimension=1, **settings):
    """v = a(t) x, whose log-determinant from t_base to t_data is the dimension times minus the integral of a."""
    velocity = lambda t, x: rate(torch.as_tensor(t)).reshape(-1, 1) * x  # noqa: E731
    return ContinuousFlow(velocity, dimension, **settings).double()


LAYERS = {
    "a boundary layer": (lambda t: 1000 * torch.exp(-1000 * t), 1 - math.exp(-1000)),
    "a narrower one": (lambda t: 1e5 * torch.exp(-1e5 * t), 1.0),
    "one at the other end": (lambda t: 1000 * torch.exp(1000 * (t - 1)), 1 - math.exp(-1000)),
    "an oscillation": (
        lambda t: 18.65 * torch.cos(61.8 * t + 3.6),
        18.65 / 61.8 * (math.sin(65.4) - math.sin(3.6)),
    ),
}


@torch.no_grad()
@alternated(name=LAYERS, method=["bosh3", "dopri5", "dopri8"])
def test_nodes_where_the_solver_took_steps(name, method):
    rate, integral = LAYERS[name]
    solver = Solver(method, max_evaluations=100_000)
    result = rate_flow(rate, likelihood=NESTED, solver=solver).evaluate(torch.ones(1, 1, dtype=torch.float64))
    error = (result.log_det + integral).abs()
    assert error <= result.quadrature_error
    # The other methods see that layer from one stage of a step alone: it is stated that it is missed.
    assert error < 2e-3 or (name == "a narrower one" and method != "dopri5")


@torch.no_grad()
@pytest.mark.parametrize("nodes", [7, 15])
@pytest.mark.parametrize("name", LAYERS)
def test_the_claim_of_fixed_nodes_is_no_lie(name, nodes):
    """They can't be refined; but the way from the first state to the last is known, and what of it they miss."""
    rate, integral = LAYERS[name]
    flow = rate_flow(rate, likelihood=Quadrature(nodes))
    for state in (1.0, 1e-2):
        result = flow.evaluate(torch.full((1, 1), state, dtype=torch.float64))
        assert (result.log_det + integral).abs() <= result.quadrature_error


@torch.no_grad()
def test_smooth_velocities_keep_one_interval_and_its_cost():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    flow = ContinuousFlow(lambda t, x: net(x), 3, likelihood=Quadrature(tolerance=0.5)).double()
    for solver in (Solver(), Solver(rtol=1e-9, atol=1e-9), Solver("bosh3"), Solver("adaptive_heun"), Solver("dopri8")):
        result = flow.replace(solver=solver).evaluate(torch.randn(50, 3, dtype=torch.float64))
        assert result.evaluations.divergence == 7


def jumping(at):
    return lambda t: torch.where(t < at, -1.0, 2.0).double()


@torch.no_grad()
@pytest.mark.parametrize("likelihood", [Quadrature(), Quadrature(7, tolerance=1e-6), NESTED, Augmented()], ids=repr)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize(("t_base", "t_data"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_jump_that_is_named_belongs_to_both(t_base, t_data, method, likelihood):
    options = {"jump_t": [0.37, 1.8]}  # of which the second is not on the way
    solver = Solver(method, rtol=1e-7, atol=1e-7, options=options)
    flow = rate_flow(jumping(0.37), 6, solver=solver, likelihood=likelihood, t_base=t_base, t_data=t_data)
    result = flow.evaluate(0.1 * torch.ones(3, 6, dtype=torch.float64))
    integral = 6 * (-0.37 + 2 * 0.63) * (t_data - t_base)
    torch.testing.assert_close(result.log_det, torch.full_like(result.log_det, -integral), rtol=0, atol=1e-5)
    assert result.quadrature_error is None or (result.quadrature_error < 1e-4).all()
    latent = torch.full((3, 6), 0.1 * math.exp(-integral / 6), dtype=torch.float64)
    torch.testing.assert_close(result.latent, latent, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("end", [0, 1])
def test_a_jump_at_an_end(end, direction):
    """The side that the solve goes to is the one that counts: its first step would else begin with the other's slope."""
    times = (0.37, 1.0)[::direction] if direction == 1 else (0.37, 0.0)
    times = times if end == 0 else times[::-1]
    flow = rate_flow(
        jumping(0.37), solver=Solver(options={"jump_t": torch.tensor(0.37)}), t_data=times[0], t_base=times[1]
    )
    result = flow.evaluate(torch.ones(1, 1, dtype=torch.float64))
    slope = 2.0 if max(times) == 1.0 else -1.0
    torch.testing.assert_close(result.log_det.item(), slope * (times[1] - times[0]), rtol=0, atol=1e-4)
    assert result.evaluations.forward < 75


@pytest.mark.parametrize("likelihood", [Quadrature(), NESTED], ids=repr)
def test_derivatives_in_times_leave_the_jump_where_it_is(likelihood):
    t_base = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    t_data = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    solver = Solver(rtol=1e-8, atol=1e-8, options={"jump_t": [0.37]})
    flow = rate_flow(jumping(0.37), solver=solver, likelihood=likelihood)
    flow.t_base, flow.t_data = t_base, t_data
    result = flow.evaluate(torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(result.log_det.item(), -(-0.27 + 2 * 0.53))
    slopes = torch.autograd.grad(result.log_det.sum(), (t_base, t_data))
    torch.testing.assert_close(torch.stack(slopes), torch.tensor([-1.0, -2.0], dtype=torch.float64))


@torch.no_grad()
def test_probes_and_penalties_across_a_jump():
    torch.manual_seed(0)
    matrix, x = torch.randn(4, 4, dtype=torch.float64), torch.ones(4_000, 4, dtype=torch.float64)
    solver = Solver(options={"jump_t": [0.37]})
    flow = ContinuousFlow(
        lambda t, x: torch.where(torch.as_tensor(t) < 0.37, -1.0, 2.0).reshape(-1, 1) * (x @ matrix.T) / 4,
        4,
        estimator=Hutchinson(2),
        solver=solver,
    ).double()
    for likelihood in (Quadrature(), NESTED):
        result = flow.replace(likelihood=likelihood).evaluate(x, penalties=("kinetic_energy",))
        expected = -matrix.trace() / 4 * (-0.37 + 2 * 0.63)
        assert abs(result.log_det.mean() - expected) < 5 * result.log_det.std() / 4_000**0.5
        torch.testing.assert_close(result.standard_error.square().mean(), result.log_det.var(), rtol=0.15, atol=0)
        constant = ContinuousFlow(lambda t, x: (3 * t**2).reshape(-1, 1) + 0 * x, 4, solver=solver).double()
        energy = constant.evaluate(x[:2], penalties=("kinetic_energy",)).penalties["kinetic_energy"]
        torch.testing.assert_close(energy, torch.full_like(energy, 4 * 9 / 5))


def test_intervals_that_steps_ask_for():
    steps = StepTimes(torch.tensor(0.0), torch.tensor(1.0))
    for i in range(100):  # in the first hundredth
        steps.accept(torch.tensor(i * 1e-4), torch.tensor(1e-4))
    pieces = Piece(0.0, 1.0, 7).resolving(steps.within, (7, 15, 31, 63), 64)
    assert pieces[0].low == 0.0
    assert pieces[-1].high == 1.0
    assert all(steps.within(piece.low, piece.high) <= piece.nodes for piece in pieces)
    assert sum(piece.nodes for piece in pieces) < 300
    assert [piece.nodes for piece in pieces if piece.low >= 0.02] == [7] * sum(piece.low >= 0.02 for piece in pieces)
    assert len(Piece(0.0, 1.0, 7).resolving(lambda low, high: math.inf, (7,), 8)) == 9


@torch.no_grad()
def test_more_steps_than_intervals_can_hold_is_an_error():
    likelihood = Quadrature(7, tolerance=1e-3, max_intervals=3)
    flow = rate_flow(LAYERS["an oscillation"][0], likelihood=likelihood)
    with pytest.raises(SolverError, match=r"3 intervals.*max_intervals"):
        flow.log_prob(torch.ones(1, 1, dtype=torch.float64))

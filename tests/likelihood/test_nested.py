"""As many nodes as a tolerance takes: nested rules, one trajectory, halves beyond them."""

import math

import pytest
import torch
from catalogue import Network
from covering import covered
from torch import nn

from divflow.divergence import Autograd, Exact, Hutchinson
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Solver, SolverError

TIGHT = Solver(rtol=1e-9, atol=1e-9)


class Rate(nn.Module):
    """v = f(t) x, whose divergence f(t) a dimension is any function of time."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, t, x):
        return self.rate(t).reshape(-1, 1) * x


def legendre(degree):
    """The integral of the square of this polynomial of 2 t - 1, of twice the degree, is 1 / (2 degree + 1)."""
    return lambda t: torch.special.legendre_polynomial_p(2 * t - 1, degree).square()


def evaluate(rate, tolerance, estimator=None, solver=TIGHT):
    flow = ContinuousFlow(
        Rate(rate), 1, likelihood=Quadrature(tolerance=tolerance), estimator=estimator, solver=solver
    ).double()
    return flow.evaluate(torch.zeros(2, 1, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize(("degree", "nodes"), [(2, 7), (5, 15), (11, 31), (23, 63)])
def test_polynomials_take_the_rule_whose_lesser_one_is_exact(degree, nodes):
    """Squares of degree 4, 10, 22 and 46, for which rules of degree 5, 11, 23 and 47 are."""
    result = evaluate(legendre(degree), 1e-9)
    assert result.evaluations.divergence == nodes
    torch.testing.assert_close(result.log_det, torch.full_like(result.log_det, -1 / (2 * degree + 1)))


@torch.no_grad()
@pytest.mark.parametrize("tolerance", [1e-1, 1e-4, 1e-9])
@pytest.mark.parametrize("frequency", [3.0, 12.0, 60.0])
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson()], ids=str)
def test_the_estimate_bounds_the_error_and_meets_the_tolerance(estimator, frequency, tolerance):
    result = evaluate(lambda t: torch.sin(frequency * t), tolerance, estimator)
    error = (result.log_det + (1 - math.cos(frequency)) / frequency).abs()
    assert (error <= result.quadrature_error + 1e-14).all()
    assert (result.quadrature_error <= tolerance).all()


@torch.no_grad()
def test_evaluations_are_kept_and_the_trajectory_is_solved_once():
    calls = []

    class Counted(Rate):
        def forward(self, t, x):
            calls.append(len(x) if t.ndim else 0)
            return super().forward(t, x)

    counts = []
    flow = ContinuousFlow(Counted(lambda t: torch.sin(12 * t)), 1, solver=TIGHT).double()
    x = torch.zeros(3, 1, dtype=torch.float64)
    flow.log_prob(x)
    for tolerance in (1e3, 1e-1, 1e-8):
        calls.clear()
        result = flow.replace(likelihood=Quadrature(tolerance=tolerance)).evaluate(x, diagnostics=False)
        counts.append(result.evaluations.divergence)
        assert sum(calls) == 3 * counts[-1]
        assert result.evaluations.forward == flow.evaluate(x).evaluations.forward
    assert counts == [7, 15, 31]


@torch.no_grad()
def test_one_sample_that_needs_more_nodes_gets_them():
    flow = ContinuousFlow(lambda t, x: torch.sin(40 * t * x), 1, likelihood=Quadrature(tolerance=1e-4), solver=TIGHT)
    x = torch.tensor([[1e-3], [1e-2], [0.02]], dtype=torch.float64)
    assert flow.evaluate(x).evaluations.divergence <= 31
    hard = torch.cat([x, torch.ones(1, 1, dtype=torch.float64)])
    assert flow.evaluate(hard).evaluations.divergence > 31
    augmented = flow.replace(likelihood=Augmented()).log_prob(hard)
    torch.testing.assert_close(flow.log_prob(hard), augmented, rtol=0, atol=1e-4)


SOLVERS = {"dopri5": TIGHT, "rk4": Solver("rk4"), "dopri8": Solver("dopri8", 1e-9, 1e-9)}


@covered(tolerance=[1e-1, 1e-8], times=[(0.0, 1.0), (1.0, -0.5)], solver=SOLVERS)
def test_values_and_gradients_are_those_of_many_fixed_nodes(tolerance, times, solver):
    torch.manual_seed(0)
    (t_base, t_data), solver = times, SOLVERS[solver]
    velocity, x = Network((2,)), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    many = ContinuousFlow(
        velocity, 2, likelihood=Quadrature(61), solver=solver, t_base=t_base, t_data=t_data, estimator=Autograd()
    ).double()
    nested = many.replace(likelihood=Quadrature(tolerance=tolerance), estimator=Exact())
    result, expected = (
        nested.evaluate(x, penalties=("kinetic_energy",)),
        many.evaluate(x, penalties=("kinetic_energy",)),
    )
    torch.testing.assert_close(result.log_prob, expected.log_prob, rtol=0, atol=tolerance)
    torch.testing.assert_close(result.latent, expected.latent, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        result.penalties["kinetic_energy"], expected.penalties["kinetic_energy"], rtol=1e-3, atol=0
    )
    of = [x, *velocity.parameters()]
    for a, b in zip(
        torch.autograd.grad(result.log_prob.sum(), of), torch.autograd.grad(expected.log_prob.sum(), of), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=max(1e-6, tolerance / 10))


def test_derivatives_in_the_parameters_and_times():
    """Against finite differences, with the trajectory's steps recorded, and with times that are differentiated."""
    torch.manual_seed(0)
    velocity, x = Network((2,)), torch.randn(2, 2, dtype=torch.float64)
    likelihood, solver = Quadrature(tolerance=1e-9), Solver(rtol=1e-10, atol=1e-10)

    def of_weight(weight):
        def bound(t, x):
            return torch.func.functional_call(velocity, {"first.weight": weight}, (t, x))

        return ContinuousFlow(bound, 2, likelihood=likelihood, solver=solver).double().log_prob(x)

    def of_time(t_data):
        flow = ContinuousFlow(velocity, 2, likelihood=likelihood, solver=solver, t_data=t_data)
        return flow.double().log_prob(x)

    torch.autograd.gradcheck(of_weight, velocity.first.weight.detach().clone().requires_grad_(), atol=1e-5)
    torch.autograd.gradcheck(of_time, torch.tensor(0.8, dtype=torch.float64, requires_grad=True), atol=1e-5)


def test_an_adjoint_gradient():
    torch.manual_seed(0)
    velocity, x = Network((2,)), torch.randn(3, 2, dtype=torch.float64)
    gradients = []
    for gradient in ("direct", "adjoint"):
        solver = Solver(rtol=1e-9, atol=1e-9, gradient=gradient)
        flow = ContinuousFlow(velocity, 2, likelihood=Quadrature(tolerance=1e-6), solver=solver).double()
        gradients.append(torch.autograd.grad(flow.log_prob(x).sum(), list(velocity.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@torch.no_grad()
def test_halves_beyond_the_last_rule():
    """A peak far narrower than the last rule's nodes are apart, which it sees all the same; its integral is an arctangent."""
    result = evaluate(lambda t: 1e-2 / (1e-4 + (t - 0.3) ** 2), 1e-6)
    expected = math.atan(70.0) + math.atan(30.0)
    torch.testing.assert_close(result.log_det, torch.full_like(result.log_det, -expected), rtol=0, atol=1e-6)
    assert result.evaluations.divergence > 63


@torch.no_grad()
def test_a_stochastic_estimator_chooses_with_frozen_probes_and_draws_new_ones():
    """Without a sign of its noise, which would take nodes without end; at the nodes chosen it is as good as ever."""
    torch.manual_seed(0)
    matrix, x = torch.randn(4, 4, dtype=torch.float64), torch.zeros(4_000, 4, dtype=torch.float64)
    flow = ContinuousFlow(
        lambda t, x: x @ matrix.T * torch.sin(12 * t).reshape(-1, 1), 4, estimator=Hutchinson(2), solver=TIGHT
    ).double()
    result = flow.replace(likelihood=Quadrature(tolerance=1e-6)).evaluate(x, diagnostics=False)
    assert result.evaluations.divergence == 31 + 31
    expected = -matrix.trace() * (1 - math.cos(12)) / 12
    assert abs(result.log_det.mean() - expected) < 5 * result.log_det.std() / 4_000**0.5
    torch.testing.assert_close(result.standard_error.square().mean(), result.log_det.var(), rtol=0.15, atol=0)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, math.nan, math.inf])
def test_refuses_what_is_no_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        Quadrature(tolerance=tolerance)


def test_a_tolerance_out_of_reach():
    with pytest.raises(SolverError, match=r"1e-12 nats.*8 intervals.*max_intervals"):
        ContinuousFlow(
            Rate(lambda t: (t - 0.37).sign()), 1, likelihood=Quadrature(tolerance=1e-12, max_intervals=8)
        ).log_prob(torch.zeros(1, 1))

"""`Solver(gradient="adjoint")` differentiates the function that was solved, in everything that it depends on."""

import functools

import pytest
import torch
from covering import alternated
from torch import nn

from divflow.divergence import Hutchinson
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Evaluations, Solver, SolverError

SIZE = 3
LIKELIHOODS = [Quadrature(), Augmented()]
ADJOINT = Solver(rtol=1e-6, atol=1e-6, gradient="adjoint")


class Velocity(nn.Module):
    """-tanh(W x + b t), with W taken from where `weight` says."""

    def __init__(self, weight, **attributes):
        super().__init__()
        self.weight = weight
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, x):
        return -torch.tanh(x @ self.weight(self).T + 0.1 * t.reshape(-1, 1))


class Doubled(torch.autograd.Function):
    """An operation that no one sees."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def matrix(theta):
    return torch.outer(theta.cos(), theta) + theta.diag()


def leaf(theta):
    return Velocity(lambda v: matrix(v.theta), theta=theta)


def closure(theta):
    found = matrix(theta)
    return Velocity(lambda v: found)


def attribute(theta):
    return Velocity(lambda v: v.found, found=matrix(theta))


def twice_an_attribute(theta):
    """Its parts by views and in a list, too."""
    found = matrix(theta)
    return Velocity(lambda v: torch.stack(v.rows) + v.found, found=found / 2, rows=list((found / 2).unbind()))


def inside_and_outside(theta):
    """The leaf, and what was made of it before."""
    return Velocity(lambda v: v.found + v.theta.diag(), found=torch.outer(theta.cos(), theta), theta=theta)


def unseen(theta):
    found = matrix(theta)
    return Velocity(lambda v: Doubled.apply(found) / 2)


def seen_and_unseen(theta):
    found = matrix(theta)
    return Velocity(lambda v: Doubled.apply(found) / 4 + found / 2)


def buffer(theta):
    velocity = Velocity(lambda v: v.found)
    velocity.register_buffer("found", matrix(theta))
    return velocity


CAPTURED = {
    make.__name__: make
    for make in (leaf, closure, attribute, twice_an_attribute, inside_and_outside, unseen, seen_and_unseen, buffer)
}


THETA = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)


def states():
    return torch.randn(2, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flow_of(velocity, likelihood=LIKELIHOODS[0], solver=ADJOINT, **options):
    return ContinuousFlow(velocity, SIZE, likelihood=likelihood, solver=solver, **options)


def total(velocity, likelihood=LIKELIHOODS[0], **options):
    return flow_of(velocity, likelihood, **options).log_prob(states()).sum()


def difference(f, value, h=1e-4):
    """The gradient by central differences, without autograd."""
    steps = torch.eye(value.numel(), dtype=torch.float64).view(-1, *value.shape) * h
    with torch.no_grad():
        return torch.stack([(f(value + step) - f(value - step)) / (2 * h) for step in steps]).view_as(value)


@functools.cache
def truth():
    """The gradient in theta, which all of them have, by a solver of its own."""
    solver = Solver("rk4", options={"step_size": 1 / 16})
    return difference(lambda theta: total(leaf(theta), solver=solver), THETA)


@functools.cache
def truth_of_matrix():
    """The gradient in the matrix itself."""
    solver = Solver("rk4", options={"step_size": 1 / 16})
    return difference(lambda value: total(Velocity(lambda v: value), solver=solver), matrix(THETA))


def close(found, true):
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


@alternated(make=CAPTURED, likelihood=LIKELIHOODS)
def test_what_a_field_captured_has_its_gradient(make, likelihood):
    theta = THETA.clone().requires_grad_()
    (found,) = torch.autograd.grad(total(CAPTURED[make](theta), likelihood), theta)
    close(found, truth())


def test_what_was_computed_before_has_a_gradient_of_its_own():
    """So that it can be asked for, and hooks of it run; the encoder's graph is gone through once."""
    theta = THETA.clone().requires_grad_()
    found, passed = matrix(theta), []
    found.register_hook(passed.append)
    loss = total(Velocity(lambda v: found))
    of_matrix, of_theta = torch.autograd.grad(loss, (found, theta))
    close(of_theta, truth())
    close(of_matrix, truth_of_matrix())
    assert len(passed) == 1


@pytest.mark.parametrize("make", ["unseen", "seen and unseen"])
def test_what_an_unseen_operation_takes_has_a_gradient_of_its_own(make):
    theta = THETA.clone().requires_grad_()
    found = matrix(theta)
    weight = {
        "unseen": lambda v: Doubled.apply(found) / 2,
        "seen and unseen": lambda v: Doubled.apply(found) / 4 + found / 2,
    }
    of_matrix, of_theta = torch.autograd.grad(total(Velocity(weight[make])), (found, theta))
    close(of_theta, truth())
    close(of_matrix, truth_of_matrix())


def test_what_an_unseen_operation_takes_and_would_count_twice_is_refused():
    theta = THETA.clone().requires_grad_()
    found = torch.outer(theta.cos(), theta)
    with pytest.raises(SolverError, match="can't be seen.*gradient='direct'"):
        total(Velocity(lambda v: Doubled.apply(found) / 2 + theta.diag()))
    rate = torch.ones(SIZE, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(SolverError, match="can't be seen.*complex"):
        total(Velocity(lambda v: Doubled.apply(rate).real.diag()))


def test_a_context_that_was_computed_costs_no_evaluation():
    counts = []
    for context in (torch.ones(2, SIZE, dtype=torch.float64), matrix(THETA.clone().requires_grad_())[:2]):
        field = Encoding(THETA.clone())
        field.forward = lambda t, x, context: -x * context
        counts.append(
            flow_of(field, solver=Solver("rk4", gradient="adjoint")).evaluate(states(), context).evaluations.forward
        )
    assert counts[0] == counts[1]


class Encoding(nn.Module):
    """A module of which a part is used outside of the solve, too."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)
        self.found = None

    def encode(self):
        return matrix(self.theta)

    def forward(self, t, x, context=None):
        weight = self.found if context is None else context[0]
        return -torch.tanh(x @ weight.T + 0.1 * t.reshape(-1, 1))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("way", ["attribute", "context"])
def test_an_encoder_that_is_a_part_of_the_field_counts_once(way, likelihood):
    velocity = Encoding(THETA.clone())
    velocity.found, context = velocity.encode(), None
    if way == "context":
        context = velocity.found.expand(2, -1, -1)
    flow_of(velocity, likelihood).log_prob(states(), context).sum().backward()
    close(velocity.theta.grad, truth())


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("computed", [False, True])
def test_parameters_of_functional_call(computed, likelihood):
    """They are the module's within the call alone, and the adjoint is solved after it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(SIZE, SIZE, bias=False).double()
            self.flow = flow_of(Velocity(lambda v: v.layer.weight, layer=layer), likelihood)

        def forward(self, x):
            return self.flow.log_prob(x)

    model, theta = Model(), THETA.clone().requires_grad_()
    weight = matrix(theta) if computed else matrix(THETA).requires_grad_()
    before = model.flow.velocity.layer.weight
    loss = torch.func.functional_call(model, {"flow.velocity.layer.weight": weight}, states()).sum()
    (found,) = torch.autograd.grad(loss, theta if computed else weight)
    close(found, truth() if computed else truth_of_matrix())
    assert model.flow.velocity.layer.weight is before


def test_a_network_in_a_plain_list():
    layer = nn.Linear(SIZE, SIZE, bias=False).double()
    layer.weight = nn.Parameter(matrix(THETA))
    total(Velocity(lambda v: v.layers[0].weight, layers=[layer])).backward()
    close(layer.weight.grad, truth_of_matrix())


def test_times_that_require_grad_beside_what_was_captured():
    theta, ends = THETA.clone().requires_grad_(), torch.tensor([0.1, 0.9], dtype=torch.float64, requires_grad=True)

    def value(theta, ends):
        found = matrix(theta)
        return total(Velocity(lambda v: found), t_base=ends[0], t_data=ends[1])

    found = torch.autograd.grad(value(theta, ends), (theta, ends))
    close(found[0], difference(lambda theta: value(theta, ends.detach()), THETA))
    close(found[1], difference(lambda ends: value(THETA, ends), ends.detach()))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64, torch.bfloat16])
def test_parameters_of_another_dtype_than_the_state(dtype):
    class Other(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate, self.plain = nn.Parameter(rate), nn.Linear(SIZE, SIZE)

        def forward(self, t, x):
            rate = (self.rate**2).real if self.rate.is_complex() else self.rate
            return self.plain(x) * rate.to(x.dtype)

    torch.manual_seed(0)
    field = Other(torch.tensor([0.75, 0.5, -0.25], dtype=dtype) + (0.5j if dtype.is_complex else 0))
    x = states().float()
    (direct,) = torch.autograd.grad(flow_of(field, solver=Solver()).log_prob(x).sum(), field.rate)
    (found,) = torch.autograd.grad(flow_of(field, solver=Solver(gradient="adjoint")).log_prob(x).sum(), field.rate)
    assert found.dtype == dtype
    torch.testing.assert_close(found, direct, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
def test_a_field_that_makes_leaves_of_its_own(likelihood):
    """They are no captured tensors: each evaluation has others."""

    class Force(nn.Module):
        def __init__(self, theta):
            super().__init__()
            self.theta = nn.Parameter(theta)

        def forward(self, t, x):
            with torch.enable_grad():
                offset = torch.zeros_like(x, requires_grad=True)
                energy = torch.log(torch.cosh((x + offset) * self.theta)).sum() + (offset**2).sum()
                return -torch.autograd.grad(energy, offset, create_graph=True)[0]

    field = Force(THETA.clone())
    total(field, likelihood).backward()
    solver = Solver("rk4")
    close(field.theta.grad, difference(lambda theta: total(Force(theta), solver=solver), THETA))


def test_evaluations_are_the_calls_of_the_field_also_where_tensors_are_looked_for():
    found, calls = matrix(THETA.clone().requires_grad_()), []

    def weight(velocity):
        calls.append(1)
        return found

    field, evaluations = Velocity(weight), Evaluations()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    (solution,) = ADJOINT.solve(lambda t, s: (field(t, s[0]),), (states(),), times, evaluations=evaluations)
    assert evaluations.forward == len(calls)
    solution.sum().backward()
    assert evaluations.forward + evaluations.backward == len(calls)


def test_a_solve_begins_with_the_evaluation_that_looks():
    counts = []
    for gradient in ("direct", "adjoint"):
        field = nn.Linear(SIZE, SIZE).double()
        nn.init.eye_(field.weight)
        solver, evaluations = Solver(gradient=gradient), Evaluations()
        times = torch.tensor([0.0, 1.0], dtype=torch.float64)
        solver.solve(
            lambda t, s, field=field: (field(s[0]),),
            (states(),),
            times,
            evaluations=evaluations,
            parameters=field.parameters(),
        )
        counts.append(evaluations.forward)
    assert counts[0] == counts[1]


class Changing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.rate, self.factor, self.change, self.calls = nn.Parameter(torch.ones(SIZE)), 1.0, change, 0

    def forward(self, t, x):
        self.calls += 1
        if self.change == "random":
            return -x * self.rate * (1 + 0.1 * torch.rand(()))
        if self.change == "remembers":
            return -x * self.rate * (1 + 0.01 * self.calls)
        return -x * self.rate * self.factor


@pytest.mark.parametrize("change", ["random", "remembers", "constant", "tensor"])
def test_a_field_that_is_not_what_it_was(change):
    field = Changing(change)
    solver = Solver("rk4", options={"step_size": 0.25}, gradient="adjoint")
    loss = flow_of(field, solver=solver).log_prob(states().float()).sum()
    if change == "constant":
        field.factor = 1.5
    if change == "tensor":
        field.factor = torch.tensor(1.5, requires_grad=True)
    with pytest.raises(SolverError, match="adjoint.*has another value.*Use gradient='direct'"):
        loss.backward()


@pytest.mark.parametrize("others", [False, True])
def test_a_tensor_that_a_field_takes_later_only(others):
    class Gated(nn.Module):
        def forward(self, t, x):
            return -x * (self.late if 0.3 < t < 0.7 else self.early)

    field, message = Gated(), r"depends on tensors of shapes \(3,\), on which it did not depend"
    field.late, field.early = torch.ones(SIZE, requires_grad=True), torch.ones(SIZE, requires_grad=others)
    with pytest.raises(SolverError, match=message):
        flow_of(field, solver=Solver("rk4", gradient="adjoint")).log_prob(states().float()).sum().backward()


def test_what_was_captured_is_not_written_to_before_the_adjoint():
    rate = torch.full((SIZE,), 0.5, requires_grad=True)
    found = rate * 1
    loss = flow_of(Velocity(lambda v: found.diag()), solver=Solver(gradient="adjoint")).log_prob(states().float()).sum()
    with torch.no_grad():
        found.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_that_is_kept_can_be_gone_through_again():
    theta = THETA.clone().requires_grad_()
    loss = total(closure(theta))
    first, second = (torch.autograd.grad(loss, theta, retain_graph=again)[0] for again in (True, False))
    close(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, theta)


def test_second_derivatives_are_refused_in_what_was_captured():
    theta = THETA.clone().requires_grad_()
    with pytest.raises(SolverError, match="once only.*direct"):
        torch.autograd.grad(total(closure(theta)), theta, create_graph=True)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
def test_a_velocity_with_its_own_divergence(likelihood):
    """Which is asked for at the tensors that were solved with, too."""

    class Own(nn.Module):
        def forward(self, t, x, context=None):
            rate = self.rate if context is None else context
            return -rate * x

        def value_and_divergence(self, t, x, context=None):
            rate = self.rate if context is None else context
            return -rate * x, -rate.expand_as(x).sum(dim=1)

    for by_context in (False, True):
        theta, velocity, context = THETA.clone().requires_grad_(), Own(), None
        velocity.rate = theta.exp()
        if by_context:
            context, velocity.rate = velocity.rate.expand(2, -1), torch.zeros(())
        (found,) = torch.autograd.grad(flow_of(velocity, likelihood).log_prob(states(), context).sum(), theta)
        # log p = sum over i of r_i - (x_i e^{r_i})^2 / 2, with r = e^theta.
        rate = THETA.exp()
        close(found, (2 - (states() * rate.exp()).square().sum(dim=0)) * rate)


def test_a_stochastic_estimator_in_the_augmented_adjoint():
    theta, seed = THETA.clone().requires_grad_(), torch.Generator

    def value(theta):
        found = matrix(theta)
        flow = flow_of(Velocity(lambda v: found), Augmented(), estimator=Hutchinson(2))
        return flow.log_prob(states(), generator=seed().manual_seed(0)).sum()

    (found,) = torch.autograd.grad(value(theta), theta)
    close(found, difference(value, THETA))

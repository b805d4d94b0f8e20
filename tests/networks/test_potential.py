"""Gradient fields: the gradient, its Laplacian from the same pass, and what is no potential."""

import math

import pytest
import torch
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, Hutchinson, check_field
from divflow.flow import ContinuousFlow
from divflow.networks import MLPPotential, NetworkError, Potential, QuadraticPotential
from divflow.operators.forward_laplacian import explain

TIMES = {"scalar t": torch.tensor(0.3).double(), "t per sample": torch.linspace(0.1, 0.9, 4).double()}
NETWORKS = {
    "one hidden layer": lambda: MLPPotential(6, hidden=(5,), activation=nn.Tanh),
    "two hidden layers": lambda: MLPPotential(6, hidden=(5, 5), sign=-1),
    "four hidden layers, softplus": lambda: MLPPotential(6, hidden=(5,) * 4, activation=nn.Softplus),
    "quadratic": lambda: MLPPotential(6, hidden=(5, 5), activation=nn.GELU, sign=-1, quadratic_rank=3),
    "not followed": lambda: Potential(Plain(lambda t, x: t * x.sort(dim=1).values.cumsum(1).sin().sum(1))),
}


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t, x):
        return self.function(t, x)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_divergence_with_first_and_second_derivatives(name, time):
    field, t = NETWORKS[name]().double(), TIMES[time].clone().requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    inputs, results = [x, t, *field.parameters()], []
    for way in (lambda: Autograd()(field, t, x), lambda: field.value_and_divergence(t, x)):
        value, divergence = way()
        objective = (value**2).sum() + (torch.linspace(1, 2, 4) * divergence).sum()
        first = torch.autograd.grad(objective, inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs, materialize_grads=True)
        results.append((value, divergence, *first, *second))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * (1 + expected.abs().max().item()))
    expected = results[0][:2]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = field.value_and_divergence(t, x)
            torch.testing.assert_close(field(t, x), expected[0].detach())
        assert not quiet.value.requires_grad
        assert not quiet.divergence.requires_grad
        torch.testing.assert_close(quiet, type(quiet)(*(z.detach() for z in expected)))


@pytest.mark.parametrize("hidden", [(), (5,), (5, 5), (5, 5, 5)])
def test_the_built_in_potential_is_carried_forward(hidden):
    field = MLPPotential((2, 3), hidden, quadratic_rank=2)
    assert explain(field.potential, 0.3, torch.randn(4, 2, 3)).method == "forward_laplacian"


def test_the_field_is_the_gradient_with_its_sign():
    phi, x = Plain(lambda t, x: (t * x**3).sum(dim=(1, 2))), torch.randn(4, 2, 3)
    for sign in (1, -1):
        field = Potential(phi, sign)
        torch.testing.assert_close(field(torch.tensor(2.0), x), sign * 6 * x**2)
        value, divergence = field.value_and_divergence(torch.tensor(2.0), x)
        torch.testing.assert_close(value, sign * 6 * x**2)
        torch.testing.assert_close(divergence, sign * 12 * x.sum(dim=(1, 2)))


def test_quadratic_part_is_the_formula():
    part, x, t = QuadraticPotential((2, 3), rank=4), torch.randn(5, 2, 3), torch.rand(5)
    nn.init.normal_(part.linear)
    s = torch.cat([x.flatten(1), t[:, None]], dim=1)
    symmetric = part.square_root.T @ part.square_root
    assert torch.linalg.matrix_rank(symmetric) == 4
    torch.testing.assert_close(part(t, x), 0.5 * torch.einsum("bi,ij,bj->b", s, symmetric, s) + s @ part.linear)
    field = Potential(Plain(lambda t, x: x.new_zeros(len(x))), -1, part)
    value, divergence = field.value_and_divergence(t, x)
    torch.testing.assert_close(value.flatten(1), -(s @ symmetric + part.linear)[:, :6])
    torch.testing.assert_close(divergence, -symmetric.diagonal()[:6].sum().expand(5))


def test_every_parameter_is_learnt():
    """Each receives a gradient, as several processes demand."""
    field = MLPPotential(3, quadratic_rank=2)
    value, divergence = field.value_and_divergence(torch.tensor(0.3), torch.randn(4, 3))
    (value.sum() + divergence.sum()).backward()
    assert all(parameter.grad is not None for parameter in field.parameters())


def test_context_reaches_the_potential():
    field, x, c = MLPPotential(3, context_features=2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    t = torch.tensor(0.3).double()
    value, divergence = field.value_and_divergence(t, x, c)
    expected = Autograd()(lambda t, x: field(t, x, c), t, x)
    torch.testing.assert_close(value, expected.value)
    torch.testing.assert_close(divergence, expected.divergence)
    assert not torch.allclose(divergence, field.value_and_divergence(t, x, c + 1).divergence)


def test_estimators_take_it_as_any_field():
    field, x, t = MLPPotential(6, (5, 5)).double(), torch.randn(4, 6).double(), torch.tensor(0.3).double()
    value, divergence = field.value_and_divergence(t, x)
    exact, estimate = Exact()(field, t, x), Hutchinson(2)(field, t, x)
    torch.testing.assert_close(exact.divergence, divergence)
    torch.testing.assert_close(exact.value, value)
    torch.testing.assert_close(estimate.value, value)


def test_flow_of_a_bowl_has_its_density():
    """dx/dt = -x/2 carries the standard normal at time 0 to a normal of variance 1/e at time 1."""
    field = Potential(Plain(lambda t, x: x.square().sum(dim=1) / 4), sign=-1)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.distributions.Normal(0, math.exp(-0.5)).log_prob(x).sum(dim=1)
    torch.testing.assert_close(ContinuousFlow(field, 3).log_prob(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (lambda t, x: x.sum(1, keepdim=True), r"\(4,\) for x of shape \(4, 3\), but returned shape \(4, 1\).*squeeze"),
        (lambda t, x: x.square(), r"returned shape \(4, 3\)\. Sum over the event"),
        (lambda t, x: x.sum(), r"returned shape \(\)"),
        (lambda t, x: 1.0, "returned a float"),
    ],
)
def test_what_is_no_potential(phi, message):
    field, x = Potential(Plain(phi)), torch.randn(4, 3)
    for call in (field, field.value_and_divergence):
        with pytest.raises(FieldError, match=message):
            call(torch.tensor(0.0), x)


def test_mixed_samples_are_refused():
    field = Potential(Plain(lambda t, x: (x - x.mean(dim=0)).square().sum(dim=1)))
    with pytest.raises(FieldError, match=r"mixes the samples.*\(4, 3\).*dimension 0"):
        field.value_and_divergence(torch.tensor(0.0), torch.randn(4, 3))
    with pytest.raises(FieldError, match="mixes the samples"):
        check_field(field, 0.0, torch.randn(4, 3))


def test_arguments_that_are_refused():
    with pytest.raises(NetworkError, match=r"sign must be 1 or -1, but is 2"):
        MLPPotential(2, sign=2)
    with pytest.raises(NetworkError, match="rank must be at least 1, but is -1"):
        MLPPotential(2, quadratic_rank=-1)
    with pytest.raises(NetworkError, match="2 context features, but got 0"):
        MLPPotential(2, context_features=2)(torch.tensor(0.0), torch.randn(3, 2))

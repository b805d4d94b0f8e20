"""Functions that write to what they are given: operators derive them as they are, and the caller's tensors stay as they were."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow import operators
from divflow.energies import PairEnergy, Tempering
from divflow.networks import Potential, QuadraticPotential

X = torch.tensor([[1.0, 2.0, -0.5], [0.3, -1.0, 0.7]], dtype=torch.float64)


def times_two(x):
    x.mul_(2)
    return (x**3).sum(dim=1)


def centred(x):
    x -= x.mean(dim=1, keepdim=True)
    return x.tanh_().pow(3).sum(dim=1)


def one_column(x):
    x[:, 0] = x[:, 0] * 3
    return (x**3).sum(dim=1)


def without_a_rule(x):
    x.mul_(2)
    return (x**3).sum(dim=1) + 0 * x.amax(dim=1)


def inplace_layer(x):
    return F.elu(x, inplace=True).square().sum(dim=1)


FUNCTIONS = {
    times_two: lambda x: ((2 * x) ** 3).sum(dim=1),
    centred: lambda x: (x - x.mean(dim=1, keepdim=True)).tanh().pow(3).sum(dim=1),
    one_column: lambda x: ((x * torch.tensor([3.0, 1.0, 1.0])) ** 3).sum(dim=1),
    without_a_rule: lambda x: ((2 * x) ** 3).sum(dim=1),
    inplace_layer: lambda x: F.elu(x).square().sum(dim=1),
}


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("differentiable", [True, False])
def test_scalar_functions(f, differentiable):
    x, pure = X.clone().requires_grad_(differentiable), FUNCTIONS[f]
    with torch.set_grad_enabled(differentiable):
        for _ in range(3):
            found = operators.value_gradient_laplacian(f, x)
        expected = operators.value_gradient_laplacian(pure, X)
        for result, true in zip(found, expected, strict=True):
            torch.testing.assert_close(result, true)
        torch.testing.assert_close(operators.gradient(f, x), operators.gradient(pure, X))
        torch.testing.assert_close(operators.hessian(f, x), operators.hessian(pure, X))
    assert torch.equal(x, X)
    e, step = torch.zeros_like(X), 1e-5
    e[0, 1] = step
    torch.testing.assert_close(
        found.gradient[0, 1].detach(), (pure(X + e) - pure(X - e))[0] / (2 * step), rtol=1e-6, atol=1e-8
    )


def test_times():
    t, x = torch.tensor([0.5, 2.0], dtype=torch.float64), X.clone()

    def g(t, x):
        t.mul_(3)
        return x.mul_(t[:, None])

    torch.testing.assert_close(operators.jacobian(g, t, x), 3 * t[:, None, None] * torch.eye(3, dtype=torch.float64))
    assert t.tolist() == [0.5, 2.0]
    assert torch.equal(x, X)


def test_plain_functions():
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([[5.0], [7.0]])

    def total(a, b):
        a.mul_(2)
        b.add_(1)
        return (a * b).sum()

    assert operators.flat_gradient(total, [a, b]).tolist() == [28.0, 28.0, 10.0, 10.0]

    def product(a, b):
        a.mul_(2)
        b.mul_(a)
        return b

    for wrt, expected in ((0, 2 * b.expand(2, 2)), (1, 2 * a.expand(2, 2))):
        torch.testing.assert_close(operators.partial_derivative(product, [a, b], wrt=wrt), expected)
    assert (a.tolist(), b.tolist()) == ([2.0, 3.0], [[5.0], [7.0]])


def test_parameters():
    x, p = torch.tensor([3.0, 5.0]), {"a": torch.tensor(2.0), "b": torch.tensor([1.0])}

    def f(p, x):
        x.mul_(2)
        p["a"].mul_(3)
        p["b"].add_(1)
        return p["a"] * x + p["b"]

    found = operators.parameter_jacobian(f, x, parameters=p)
    assert found["a"].tolist() == [18.0, 30.0]
    assert found["b"].tolist() == [[1.0], [1.0]]
    assert (x.tolist(), p["a"].item(), p["b"].tolist()) == ([3.0, 5.0], 2.0, [1.0])
    layers = nn.Sequential(nn.ELU(inplace=True), nn.Linear(2, 1))
    rows = torch.tensor([[-1.0, 2.0], [0.5, -3.0]])
    found = operators.parameter_jacobian(layers, rows)
    torch.testing.assert_close(found["1.weight"][:, 0, 0], F.elu(rows))
    assert rows.tolist() == [[-1.0, 2.0], [0.5, -3.0]]


class Greedy(nn.Module):
    """Writes to all that it is given."""

    def forward(self, t, x, context=None):
        x.mul_(2)
        t.add_(1)
        if context is not None:
            context.mul_(3)
            return t * (x * context).square().sum(dim=1)
        return t * x.square().sum(dim=1)


@pytest.mark.parametrize("conditional", [False, True])
def test_potentials(conditional):
    t, x = torch.tensor(0.5, dtype=torch.float64), X.clone()
    context = torch.tensor([[1.0], [2.0]], dtype=torch.float64) if conditional else None
    given = (t, x) if context is None else (t, x, context)
    factor = 12.0 if context is None else 12.0 * 9 * context**2
    quadratic = QuadraticPotential(3).double()
    slope = operators.gradient(lambda z: quadratic(t, z), X)
    for net, more in ((Potential(Greedy()), 0), (Potential(Greedy(), quadratic=quadratic), slope)):
        for _ in range(2):
            torch.testing.assert_close(net(*given), factor * X + more)
            value, divergence = net.value_and_divergence(*given)
            torch.testing.assert_close(value, factor * X + more)
        whole = (factor * torch.ones_like(X)).sum(dim=1)
        if net.quadratic is not None:
            whole = whole + operators.laplacian(lambda z: quadratic(t, z), X)
        torch.testing.assert_close(divergence, whole)
        before = net.potential(*given)
        torch.testing.assert_close(net.potential(*given), before)
    assert t.item() == 0.5
    assert torch.equal(x, X)
    assert context is None or context.flatten().tolist() == [1.0, 2.0]


class Writing(PairEnergy):
    """Harmonic springs, u = r^2 / 4 of each pair."""

    def pair(self, squared):
        return squared.mul_(0.25)

    def __call__(self, x):
        return super().__call__(x.sub_(x.mean(dim=1, keepdim=True)))


def test_energies():
    sampler = Tempering(rungs=2, std=2.0, chains=100, warm_up=20, thin=1)
    found = sampler(Writing(3, 2), 2000, torch.Generator().manual_seed(0))
    # The sum over pairs of r^2 / 4 is 3 / 4 |x|^2: a normal density of variance 2 / 3 in 4 dimensions.
    true = 2 * torch.log(torch.tensor(2 * torch.pi * 2 / 3)).item()
    assert abs(found.log_normalizer - true) < 4 * found.standard_error
    assert abs(found.samples.square().sum(dim=(1, 2)).mean().item() - 8 / 3) < 0.3


def test_names_of_parameters():
    net, x = nn.Linear(2, 1), torch.randn(3, 2)
    with pytest.raises(operators.FieldError, match="no parameter wieght; it has weight, bias"):
        operators.parameter_jacobian(net, x, parameters={"wieght": net.weight})
    with pytest.raises(operators.FieldError, match="no parameter 0.weight"):
        operators.parameter_jacobian(net, x, parameters={"0.weight": net.weight, "weight": net.weight})
    tied = nn.ModuleDict({"a": net, "b": net})
    tied.forward = lambda x: tied["a"](x) + tied["b"](x)
    found = operators.parameter_jacobian(tied, x, parameters={"b.weight": net.weight})
    torch.testing.assert_close(found["b.weight"][:, 0, 0], 2 * x)
    buffered = nn.Linear(2, 2)
    buffered.register_buffer("scale", torch.ones(2))
    buffered.forward = lambda x: x * buffered.scale
    assert operators.parameter_jacobian(buffered, x, parameters={"scale": buffered.scale})["scale"].shape == (3, 2, 2)

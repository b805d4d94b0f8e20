"""Complex functions of real arguments: both parts are derived, by every operator, or the type is refused."""

import pytest
import torch
from torch import nn

from divflow import operators
from divflow.divergence import Autograd, Exact, FieldError, Hutchinson, HutchPlusPlus, check_field, divergence
from divflow.energies import PairEnergy
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine
from divflow.networks import Potential

X = torch.tensor([[1.0, 2.0, -0.5], [0.3, -1.0, 0.7]], dtype=torch.float64)
WAVE = torch.tensor([0.4, -1.1, 0.8], dtype=torch.float64)


def plane_wave(x):
    """exp(i k x) exp(-|x|^2 / 2), by a phase and an amplitude."""
    return torch.polar((-x.square().sum(dim=1) / 2).exp(), x @ WAVE.to(x))


def plane_wave_in_one(x):
    return (1j * (x @ WAVE.to(x)) - x.square().sum(dim=1) / 2).exp()


def conjugate(x):
    return plane_wave(x).conj()


def truth(x):
    """Value, gradient, Hessian and Laplacian of the plane wave, in closed form."""
    value = (1j * (x @ WAVE) - x.square().sum(dim=1) / 2).exp()
    slope = 1j * WAVE - x
    hessian = slope[:, :, None] * slope[:, None, :] - torch.eye(3).double()
    laplacian = slope.square().sum(dim=1) - 3
    return value, slope * value[:, None], hessian * value[:, None, None], laplacian * value


@pytest.mark.parametrize("f", [plane_wave, plane_wave_in_one, conjugate])
@pytest.mark.parametrize("differentiable", [True, False])
def test_wave_functions(f, differentiable):
    value, gradient, hessian, laplacian = (z.conj() if f is conjugate else z for z in truth(X))
    with torch.set_grad_enabled(differentiable):
        for _ in range(3):
            found = operators.value_gradient_laplacian(f, X)
        torch.testing.assert_close(found.value.resolve_conj(), value.resolve_conj())
        torch.testing.assert_close(found.gradient, gradient.resolve_conj())
        torch.testing.assert_close(found.laplacian, laplacian.resolve_conj())
        torch.testing.assert_close(operators.gradient(f, X), gradient.resolve_conj())
        torch.testing.assert_close(operators.hessian(f, X), hessian.resolve_conj())
        torch.testing.assert_close(operators.laplacian(f, X), laplacian.resolve_conj())
    assert operators.explain_laplacian(f, X).method == "reverse"


def test_jacobians():
    def g(t, x):
        return torch.stack([(1 + 2j) * x[:, 0] * x[:, 1], 1j * x[:, 2] ** 2], dim=1)

    found = operators.jacobian(g, 0.0, X)
    zero = torch.zeros(2).double()
    expected = torch.stack(
        [
            torch.stack([(1 + 2j) * X[:, 1], (1 + 2j) * X[:, 0], 0j * zero], dim=1),
            torch.stack([0j * zero, 0j * zero, 2j * X[:, 2]], dim=1),
        ],
        dim=1,
    )
    torch.testing.assert_close(found, expected)
    assert operators.jacobian(g, 0.0, X[:0]).shape == (0, 2, 3)
    assert operators.jacobian(g, 0.0, X[:0]).is_complex()


def test_plain_derivatives():
    a, b = torch.tensor([2.0, 3.0]), torch.tensor(5.0)
    found = operators.flat_gradient(lambda a, b: (a**2).sum() * (1 + 1j) + 3j * b, [a, b])
    assert found.tolist() == [4 + 4j, 6 + 6j, 3j]
    found = operators.partial_derivative(lambda a, b: a * b * (1 - 2j), [a, b], wrt=0)
    assert found.tolist() == [5 - 10j, 5 - 10j]
    mixed = operators.partial_derivative(lambda a, b: a**2 * b, [a, torch.tensor(2j)], wrt=0)
    assert mixed.tolist() == [8j, 12j]


def test_derivatives_in_parameters():
    x, p = torch.tensor([3.0, 5.0]), {"a": torch.tensor(2.0), "b": torch.tensor([1.0, 2.0])}
    found = operators.parameter_jacobian(lambda p, x: (p["a"] ** 2 * x * (1 + 2j))[:, None] * p["b"], x, parameters=p)
    torch.testing.assert_close(found["a"], 4 * (1 + 2j) * x[:, None] * p["b"])
    torch.testing.assert_close(found["b"], 4 * (1 + 2j) * x[:, None, None] * torch.eye(2))
    empty = operators.parameter_jacobian(lambda p, x: p["a"] * x * 1j, x[:0], parameters={"a": p["a"]})
    assert empty["a"].shape == (0,)
    assert empty["a"].is_complex()


def test_second_derivatives_of_parts():
    """What is returned is differentiable again, in both parts."""
    x = X.clone().requires_grad_()
    laplacian = operators.laplacian(plane_wave, x)
    (slope,) = torch.autograd.grad(laplacian.imag.sum(), x)
    e, step = torch.zeros_like(X), 1e-5
    e[1, 2] = step
    difference = (truth(X + e)[3].imag - truth(X - e)[3].imag).sum() / (2 * step)
    torch.testing.assert_close(slope[1, 2], difference, rtol=1e-6, atol=1e-8)


def test_complex_states_and_parameters_are_refused():
    z = torch.randn(2, 3, dtype=torch.complex64)
    calls = [
        lambda: operators.gradient(lambda x: x.abs().sum(dim=1), z),
        lambda: operators.laplacian(lambda x: x.abs().sum(dim=1), z),
        lambda: operators.hessian(lambda x: x.abs().sum(dim=1), z),
        lambda: operators.jacobian(lambda t, x: x, 0.0, z),
        lambda: operators.flat_gradient(lambda x: x.abs().sum(), [z]),
        lambda: operators.partial_derivative(lambda x: x.abs(), [z], wrt=0),
        lambda: operators.parameter_jacobian(lambda p, x: p["a"] * x, z, parameters={"a": torch.tensor(1j)}),
        lambda: operators.parameter_jacobian(nn.Linear(3, 1, dtype=torch.complex64), z),
        lambda: operators.parameter_jacobian(lambda p, x: p["a"] * x, X, parameters={"a": torch.tensor(1)}),
        lambda: check_field(lambda t, x: x, 0.0, z),
        lambda: divergence(lambda t, x: x, 0.0, z),
        lambda: divergence(lambda t, x: x, 0.0, z, Hutchinson()),
        lambda: ContinuousFlow(lambda t, x: -x, 3).log_prob(z),
    ]
    for call in calls:
        with pytest.raises(FieldError, match="floating"):
            call()


@pytest.mark.parametrize("estimator", [Exact(), Exact("forward"), Autograd(), Hutchinson(2), HutchPlusPlus(3)], ids=str)
def test_complex_fields_are_refused(estimator):
    with pytest.raises(FieldError, match="complex"):
        divergence(lambda t, x: (1 + 1j) * x, 0.0, X, estimator)
    with pytest.raises(FieldError, match="complex"):
        check_field(lambda t, x: (1 + 1j) * x, 0.0, X)
    with pytest.raises(FieldError, match="complex"):
        operators.laplacian(plane_wave, X, estimator)


class Wave(nn.Module):
    def forward(self, t, x):
        return plane_wave(x)


class Square(nn.Module):
    def forward(self, t, x):
        return x.square().sum(dim=1)


@pytest.mark.parametrize("net", [Potential(Wave()), Potential(Square(), quadratic=Wave())], ids=["phi", "quadratic"])
def test_complex_potentials_are_refused(net):
    t = torch.tensor(0.0)
    calls = [
        lambda: net(t, X),
        lambda: net.potential(t, X),
        lambda: net.value_and_divergence(t, X),
        lambda: divergence(net, t, X),
        lambda: check_field(net, t, X),
        lambda: ContinuousFlow(net, 3).log_prob(X),
    ]
    for call in calls:
        with pytest.raises(FieldError, match="complex"):
            call()


def test_a_divergence_of_ones_own_must_be_real():
    class Own:
        def __call__(self, t, x):
            return x**2

        def value_and_divergence(self, t, x):
            return x**2, 2 * x.sum(dim=1) * (1 + 1j)

    with pytest.raises(FieldError, match="complex"):
        divergence(Own(), 0.0, X)


def test_real_functions_through_complex_values():
    """A density |psi|^2, and a real part: nothing is lost on the way."""
    for f in (lambda x: plane_wave(x).abs().square(), lambda x: (plane_wave(x) * plane_wave(x).conj()).real):
        expected = (4 * X.square().sum(dim=1) - 6) * (-X.square().sum(dim=1)).exp()
        torch.testing.assert_close(operators.laplacian(f, X), expected)
    torch.testing.assert_close(operators.laplacian(lambda x: plane_wave(x).imag, X), truth(X)[3].imag)

    def field(t, x):
        z = torch.fft.fft(x, dim=1)
        return torch.fft.ifft(z * z.abs(), dim=1).real

    torch.testing.assert_close(divergence(field, 0.0, X), divergence(field, 0.0, X, Autograd()))


def test_complex_energies_and_targets_are_refused():
    class Complex(PairEnergy):
        def pair(self, squared):
            return squared * (1 + 1j)

    with pytest.raises(DivflowError, match="complex"):
        Complex(3, 2)(torch.randn(4, 3, 2))
    density = FlowDensity(ContinuousFlow(lambda t, x: -x, 3), Affine())
    with pytest.raises(DivflowError):
        density.flow.importance_weights(plane_wave, 16)

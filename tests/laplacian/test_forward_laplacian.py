"""The forward Laplacian against double backward: values, first and second derivatives, on every kind of function."""

import pytest
import torch
from covering import alternated
from torch import nn
from written import D, tagged
from written.fields import DEFAULT, POTENTIALS
from written.scalars import SCALARS, net

from divflow.divergence import Autograd
from divflow.operators import explain_laplacian, gradient, laplacian, value_gradient_laplacian
from divflow.operators.forward_laplacian import value_gradient_laplacian as at_time
from divflow.verification import severed_fields


@pytest.fixture(autouse=True)
def _derivatives_are_those_of_autograd():
    """Whatever is detached, or changed by a hook: the ways to a Laplacian are compared with one another."""
    with severed_fields("allow"):
        yield


FORWARD = "forward_laplacian"


def by_autograd(f, x):
    value, divergence = Autograd()(lambda _, z: gradient(f, z), 0.0, x)
    with torch.random.fork_rng():
        return f(x), value, divergence


def make(name, dtype=torch.float64):
    return POTENTIALS[name].function().to(dtype), torch.randn(4, D, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + b.detach().abs().max().item()))


FOLLOWED = tagged(POTENTIALS, "jets", without=["random", "stateful"])


@alternated(name=SCALARS, dtype=[torch.float64, torch.float32])
def test_value_gradient_and_laplacian(name, dtype):
    value_gradient_and_laplacian(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "name", [name for name in FOLLOWED if name not in SCALARS and "double" not in POTENTIALS[name].tags]
)
def test_value_gradient_and_laplacian_of_sums(name, dtype):
    value_gradient_and_laplacian(name, dtype)


def value_gradient_and_laplacian(name, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    f, x = make(name, dtype)
    expected = by_autograd(f, x)
    for _ in range(3):  # the second call is verified again, the third trusted
        close(value_gradient_laplacian(f, x), expected, tolerance)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                quiet = value_gradient_laplacian(f, x)
            assert not any(z.requires_grad for z in quiet)
            close(quiet, [z.detach() for z in expected], tolerance)
    assert explain_laplacian(f, x).method == FORWARD


@pytest.mark.parametrize("name", SCALARS)
def test_first_and_second_derivatives(name):
    first_and_second_derivatives(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOLLOWED if name not in SCALARS])
def test_first_and_second_derivatives_of_sums(name):
    first_and_second_derivatives(name)


def first_and_second_derivatives(name):
    f, x = make(name)
    x.requires_grad_()
    inputs, results = [x, *(parameter for parameter in f.parameters() if parameter.requires_grad)], []
    for way in (by_autograd, value_gradient_laplacian):
        value, slope, lap = way(f, x)
        objective = (value**2).sum() + (slope**2).sum() + (torch.linspace(1, 2, 4) * lap).sum()
        if not objective.requires_grad:
            objective = objective + 0 * x.sum()
        first = torch.autograd.grad(objective, inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first) + 0 * x.sum(), inputs, materialize_grads=True)
        results.append((*first, *second))
    close(results[1], results[0], 1e-9)


def test_derivatives_of_layer_normalization_by_differences():
    f, x = make("layer normalization")
    parameters = list(f.parameters())
    steps = [1e-5 * torch.randn_like(z) for z in (x, *parameters)]
    inputs = [x.requires_grad_(), *parameters]
    gradients = torch.autograd.grad(laplacian(f, x).sum(), inputs, materialize_grads=True)
    slope = sum((g * step).sum() for g, step in zip(gradients, steps, strict=True))
    sums = []
    with torch.no_grad():
        for sign in (1, -2):
            for z, step in zip(inputs, steps, strict=True):
                z += sign * step
            sums.append(laplacian(f, x).sum())
    torch.testing.assert_close(slope, (sums[0] - sums[1]) / 2, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in FOLLOWED if name not in SCALARS],
)
def test_sums(name):
    f, x = make(name)
    inputs = [x.requires_grad_(), *(parameter for parameter in f.parameters() if parameter.requires_grad)]
    results, gradients = [way(f, x) for way in (value_gradient_laplacian, by_autograd)], []
    close(*results)
    for _, slope, lap in results:
        objective = lap.sum() + (slope**2).sum() + 0 * x.sum()
        gradients.append(torch.autograd.grad(objective, inputs, materialize_grads=True))
    close(*gradients)
    plan = explain_laplacian(f, x)
    assert plan.method == FORWARD
    assert "products of its own" not in plan.why


@pytest.mark.slow
@pytest.mark.parametrize("name", tagged(POTENTIALS, without=["jets", "random", "stateful", "once"]))
def test_what_is_not_carried_in_closed_form_is_exact_all_the_same(name):
    f, x = make(name)
    for _ in range(2):
        close(value_gradient_laplacian(f, x), by_autograd(f, x))
    plan = explain_laplacian(f, x)
    assert plan.method != FORWARD or "products of its own" in plan.why


@pytest.mark.parametrize(
    "name",
    """
    exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh atanh sigmoid sqrt rsqrt abs
    reciprocal square erf erfc lgamma digamma sinc softplus silu gelu mish relu logit neg floor sign trunc
    """.split(),  # noqa: SIM905 - a list of these would take a screen
)
def test_functions_of_one_argument_in_every_form(name):
    x = torch.rand(3, 4, dtype=torch.float64) * 0.8 + 0.1
    forms = [getattr(namespace, name, None) for namespace in (torch, nn.functional, torch.special)]
    forms += [lambda z: getattr(z, name)()] if hasattr(torch.Tensor, name) else []
    for form in filter(callable, forms):

        def f(x, form=form):
            return form(x * x).sum(dim=1)

        close(value_gradient_laplacian(f, x), by_autograd(f, x))
        assert explain_laplacian(f, x).method == FORWARD


@pytest.mark.parametrize("event", [(), (1,), (2, 1, 3)], ids=str)
def test_any_event_shape(event):
    x = torch.randn(4, *event, dtype=torch.float64)

    def f(x):
        flat = x.reshape(len(x), -1)
        return (flat**4).sum(dim=1) + flat.sum(dim=1).sin()

    size = x[0].numel()
    flat = x.reshape(4, -1)
    torch.testing.assert_close(laplacian(f, x), (12 * flat**2).sum(dim=1) - size * flat.sum(dim=1).sin())
    assert explain_laplacian(f, x).method == FORWARD


def test_known_potentials():
    """Functions whose Laplacian is known: 1/r is harmonic, a Gaussian is an eigenfunction of the oscillator."""
    x = torch.randn(5, 3, dtype=torch.float64) + 2
    torch.testing.assert_close(laplacian(lambda x: 1 / x.norm(dim=1), x), torch.zeros(5, dtype=torch.float64))

    def psi(x):
        return torch.exp(-x.square().sum(dim=1) / 2)

    torch.testing.assert_close(-laplacian(psi, x) / 2 + x.square().sum(1) / 2 * psi(x), 1.5 * psi(x))
    plane = x[:, :2]
    wave = lambda x: x[:, 0].exp() * x[:, 1].sin()  # noqa: E731
    torch.testing.assert_close(laplacian(wave, plane), torch.zeros(5, dtype=torch.float64))


def test_a_norm_at_zero_has_autograds_gradient():
    f, zeros = lambda x: x.norm(dim=1) + (x**2).sum(dim=1), torch.zeros(3, 4, dtype=torch.float64)
    for x in (zeros + 1, zeros + 2, zeros, zeros):
        torch.testing.assert_close(value_gradient_laplacian(f, x).gradient, gradient(f, x))


def test_times_one_a_sample_or_shared():
    network, x = net(5, 5, inputs=D + 1).double(), torch.randn(4, D, dtype=torch.float64)

    def phi(t, x):
        return network(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], dim=1))

    for t in (torch.tensor(0.3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)):
        t.requires_grad_()
        results = at_time(phi, t, x), by_autograd(lambda z, t=t: phi(t, z), x)
        close(*results)
        close(*(torch.autograd.grad(lap.sum() + (g**2).sum(), t) for _, g, lap in results))


def test_chunks_of_tangents(monkeypatch):
    f, x = make("four hidden layers")
    expected = by_autograd(f, x)
    for elements in (1, 60):  # one tangent at a time, or two
        monkeypatch.setattr("divflow.operators.forward_laplacian.forward._CPU_ELEMENTS", elements)
        close(value_gradient_laplacian(f, x), expected)


def test_one_mask_of_dropout():
    f, x = net(50, activation=lambda: nn.Sequential(nn.Dropout(0.5), nn.Tanh())).double(), torch.randn(4, D).double()
    results = []
    for way in (value_gradient_laplacian, value_gradient_laplacian, by_autograd):
        torch.manual_seed(3)
        results.append((way(f, x)[1], torch.rand(2)))
    close(results[0], results[2])
    close(results[1], results[2])

"""Every row of the operators' table, with the worked example of the question that it answers."""

import pytest
import torch
from torch import nn

from divflow.divergence import FieldError, Hutchinson, divergence
from divflow.operators import (
    flat_gradient,
    gradient,
    hessian,
    jacobian,
    laplacian,
    parameter_jacobian,
    partial_derivative,
)
from divflow.verification import severed_fields


def test_affine_family_over_a_thousand_samples():
    x = torch.randn(1_000)
    parameters = {"a": torch.tensor(2.0), "b": torch.tensor(-1.0)}
    result = parameter_jacobian(lambda p, x: p["a"] * x + p["b"], x, parameters=parameters)
    torch.testing.assert_close(result["a"], x)
    torch.testing.assert_close(result["b"], torch.ones(1_000))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_linear_map(chunk_size):
    n, m, x = 3, 2, torch.randn(5, 3)
    parameters = {"A": torch.randn(n, m), "b": torch.randn(m)}
    result = parameter_jacobian(lambda p, x: x @ p["A"] + p["b"], x, parameters=parameters, chunk_size=chunk_size)
    torch.testing.assert_close(result["b"], torch.eye(m).expand(5, m, m))
    expected = torch.zeros(5, m, n, m)
    for j in range(m):
        expected[:, j, :, j] = x
    torch.testing.assert_close(result["A"], expected)


def test_module_parameters_by_a_loop_over_samples():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    result = parameter_jacobian(network, x)
    assert list(result) == [name for name, _ in network.named_parameters()]
    for b in range(6):
        for i in range(2):
            rows = torch.autograd.grad(network(x[b : b + 1])[0, i], list(network.parameters()))
            for got, row in zip(result.values(), rows, strict=True):
                torch.testing.assert_close(got[b, i], row)
    assert all(parameter.grad is None for parameter in network.parameters())
    some = parameter_jacobian(network, x, parameters={"2.bias": network[2].bias})
    torch.testing.assert_close(some["2.bias"], torch.eye(2).expand(6, 2, 2))


def test_parameter_jacobian_shares_scalar_inputs():
    t, x = torch.tensor(3.0), torch.randn(4)
    result = parameter_jacobian(lambda p, t, x: p["a"] * t * x, t, x, parameters={"a": torch.tensor(1.0)})
    torch.testing.assert_close(result["a"], 3 * x)


def test_elementwise_product_has_a_diagonal_jacobian_and_hessian():
    scale, x = torch.arange(4), torch.ones(1, 4)
    torch.testing.assert_close(
        jacobian(lambda t, x: x * x * scale, 0.0, x)[0], torch.diag(torch.tensor([0.0, 2, 4, 6]))
    )
    expected = torch.zeros(4, 4, 4)
    for i in range(4):
        expected[i, i, i] = 2 * i
    result = hessian(lambda x: x * x * scale, x)
    assert result.shape == (1, 4, 4, 4)
    torch.testing.assert_close(result[0], expected)


def test_several_inputs():
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([6.0, 4.0])
    expected = [9 * a**2, -2 * b]
    for i in range(2):
        torch.testing.assert_close(partial_derivative(lambda a, b: 3 * a**3 - b**2, [a, b], wrt=i), expected[i])
    flat = flat_gradient(lambda a, b: (3 * a**3 - b**2).sum(), [a, b])
    torch.testing.assert_close(flat, torch.cat(expected))


def test_three_outputs_of_two_inputs():
    def g(t, x):
        return torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], dim=1)

    result = jacobian(g, 0.0, torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(result[0], torch.tensor([[4.0, 0], [3, 2], [0, 6]]))


def test_detached_factor():
    x = torch.tensor([[3.0]])
    with severed_fields("allow"):
        torch.testing.assert_close(jacobian(lambda t, x: (x * x).detach() * x, 0.0, x), torch.tensor([[[9.0]]]))


def test_square_of_an_image():
    x = torch.randn(1, 3, 2, 2)
    full = jacobian(lambda t, x: x**2, 0.0, x)
    assert full.shape == (1, 3, 2, 2, 3, 2, 2)
    matrix = full.reshape(1, 12, 12)
    torch.testing.assert_close(matrix.diagonal(dim1=1, dim2=2).sum(dim=1), divergence(lambda t, x: x**2, 0.0, x))
    flattened = jacobian(lambda t, x: (x**2).reshape(-1, 12), 0.0, x)
    torch.testing.assert_close(flattened.reshape(1, 12, 12), matrix)


def test_grid_derivative():
    t, k = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2.0, 3.0]])
    result = partial_derivative(lambda t, k: t * k + 2 * t * k**2, [t, k], wrt=1)
    torch.testing.assert_close(result, torch.tensor([[9.0, 13], [18, 26], [36, 52]]))
    torch.testing.assert_close(
        partial_derivative(lambda t, k: t * k + 2 * t * k**2, [t, k], wrt=-2), (k + 2 * k**2).expand(3, 2)
    )


@pytest.mark.parametrize("event", [(), (3,), (2, 1, 3)], ids=str)
def test_gradient_hessian_and_laplacian_of_a_sum_of_powers(event):
    x = torch.randn(4, *event, dtype=torch.float64)

    def f(x):
        return (x**4).reshape(4, -1).sum(dim=1)

    torch.testing.assert_close(gradient(f, x), 4 * x**3)
    torch.testing.assert_close(laplacian(f, x), (12 * x**2).reshape(4, -1).sum(dim=1))
    full = hessian(f, x)
    assert full.shape == (4, *event, *event)
    size = x[0].numel()
    torch.testing.assert_close(full.reshape(4, size, size), torch.diag_embed((12 * x**2).reshape(4, size)))
    # A diagonal Hessian is what Rademacher probes are exact for.
    torch.testing.assert_close(laplacian(f, x, Hutchinson()), laplacian(f, x))


@pytest.mark.parametrize("estimator", [None, Hutchinson()])
def test_the_laplacian_of_a_vector_is_that_of_each_of_its_outputs(estimator):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        return torch.stack([(x**2).sum(dim=1), x[:, 0], (x**3).sum(dim=1), 0 * x[:, 1]], dim=1).view(-1, 2, 2)

    found = laplacian(f, x, estimator)
    zero = torch.zeros(3, dtype=torch.float64)
    expected = torch.stack([zero + 8, zero, 6 * x.sum(dim=1), zero], dim=1).view(3, 2, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], torch.full_like(x, 6.0))
    assert laplacian(lambda x: (x**2).sum(dim=1, keepdim=True), x).tolist() == [[8.0]] * 3
    assert laplacian(lambda x: x[:, :0], x).shape == (3, 0)
    assert laplacian(lambda x: torch.polar(x, x), x).dtype == torch.complex128


def test_flat_gradient_takes_whatever_holds_tensors():
    linear = nn.Linear(2, 2)
    expected = torch.cat([2 * linear.weight.flatten(), 2 * linear.bias])
    torch.testing.assert_close(flat_gradient(lambda a, b: (a**2).sum() + (b**2).sum(), linear.parameters()), expected)
    assert flat_gradient(lambda a: (a**2).sum(), torch.tensor([[1.0, 2.0]])).tolist() == [2.0, 4.0]


def test_partial_derivatives_of_numbers_and_by_name():
    t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = partial_derivative(lambda t, k: t * k + k**2, [t, 0.1], "k")
    torch.testing.assert_close(found, t + 0.2, rtol=1e-15, atol=0)  # 0.1 in t's own digits
    assert partial_derivative(lambda t, k: t * k, (it for it in (t, t)), -2).tolist() == [1.0, 2.0]
    assert partial_derivative(lambda t, k: t * k, [2.0, 3], "t").item() == 3.0


def test_results_are_differentiable_again():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def f(x):
        return (torch.sin(x) * x.roll(1, dims=1)).sum(dim=1)

    assert torch.autograd.gradcheck(lambda x: gradient(f, x), (x,))
    assert torch.autograd.gradcheck(lambda x: hessian(f, x), (x,))
    assert torch.autograd.gradcheck(lambda x: laplacian(f, x), (x,))
    assert torch.autograd.gradcheck(lambda x: jacobian(lambda t, x: t * x**3, 2.0, x), (x,))
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(gradient(lambda x: (weight * x**2).sum(dim=1), x.detach()).sum(), weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operators_without_gradients(mode):
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with mode():
        x = torch.randn(2, 3)
        results = [
            gradient(lambda x: network(x).sum(dim=1), x),
            jacobian(lambda t, x: network(x), 0.0, x),
            hessian(lambda x: network(x).sum(dim=1), x),
            laplacian(lambda x: network(x).sum(dim=1), x),
            flat_gradient(lambda x: network(x).sum(), [x]),
            partial_derivative(lambda a, b: a * b, [x, x], 0),
            *parameter_jacobian(network, x).values(),
        ]
    assert all(not result.requires_grad for result in results)
    torch.testing.assert_close(results[3], results[2].diagonal(dim1=1, dim2=2).sum(dim=1))


def test_arguments_are_left_alone():
    x, weight = torch.randn(2, 3), torch.randn(3, requires_grad=True)
    jacobian(lambda t, x: x * weight, 0.0, x)
    flat_gradient(lambda w: (w**2).sum(), [weight])
    parameter_jacobian(lambda p, x: x @ p["w"], x, parameters={"w": weight})
    assert not x.requires_grad
    assert weight.grad is None


def test_empty_batches():
    x = torch.zeros(0, 3)
    assert gradient(lambda x: x.sum(dim=1), x).shape == (0, 3)
    assert jacobian(lambda t, x: x[:, :2], 0.0, x).shape == (0, 2, 3)
    assert hessian(lambda x: x**2, x).shape == (0, 3, 3, 3)
    assert laplacian(lambda x: x.sum(dim=1), x).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gradient(lambda x: x**2, x), r"one number per sample.*\(2, 3\)"),
        (lambda x: gradient(lambda x: x.sum(dim=1), x.long()), "int64"),
        (lambda x: flat_gradient(lambda x: x, [x]), "one scalar"),
        (lambda x: flat_gradient(lambda: 0, []), "at least one tensor"),
        (lambda x: jacobian(lambda t, x: x.sum(dim=0), 0.0, x), "one value per sample"),
        (lambda x: partial_derivative(lambda a, b: a @ b, [x, x.T], 0), "broadcast"),
        (lambda x: partial_derivative(lambda a, b: (a * b).sum(), [x, x], 0), "elementwise"),
        (lambda x: partial_derivative(lambda a: a, [x], 1), "wrt.*1"),
        (lambda x: partial_derivative(lambda a, b: a * b, [x, x], "c"), r"names, a, b, but is 'c'"),
        (lambda x: partial_derivative(torch.sub, [x, x], "a"), r"counted from 0, but is 'a'"),
        (lambda x: partial_derivative(lambda a: a, [x], 0.0), r"but is 0\.0"),
        (lambda x: partial_derivative(lambda a: a, [x], True), "but is True"),
        (lambda x: partial_derivative(lambda a, b: a, [x, "b"], 0), "tensors or numbers.*'b'"),
        (lambda x: flat_gradient(lambda x: x.sum(), 3.0), r"a float, 3\.0"),
        (lambda x: flat_gradient(lambda x: x.sum(), [None]), "a NoneType"),
        (lambda x: flat_gradient(lambda x: x.sum(), x.long()), "is torch.int64"),
        (lambda x: parameter_jacobian(lambda p, x: x, x), "no parameters"),
        (lambda x: parameter_jacobian(lambda p, x, y: x, x, x[:1], parameters={"a": x}), "batch size"),
        (lambda x: parameter_jacobian(lambda p, x: p["a"].sum(), x, parameters={"a": x}), "one value per sample"),
    ],
)
def test_errors_name_the_problem(call, message):
    with pytest.raises(FieldError, match=message):
        call(torch.randn(2, 3))

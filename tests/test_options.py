"""Options of torch's functions in any order, by place or by name: their derivatives are those of what was called."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Autograd, Exact, divergence
from divflow.operators import hessian, laplacian

FAR = torch.full((2, 3), 60.0, dtype=torch.float64)
NEAR = torch.tensor([[0.03, -0.02, 0.3], [0.7, 0.01, -0.4]], dtype=torch.float64)
ROW = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

ELEMENTWISE = {
    "softplus": lambda x: F.softplus(x),
    "softplus, by place": lambda x: F.softplus(x, 20.0, 1.0),
    "softplus, by name": lambda x: F.softplus(x, beta=20.0, threshold=1.0),
    "softplus, the other way round": lambda x: F.softplus(x, threshold=1.0, beta=20.0),
    "softplus, its defaults the other way round": lambda x: F.softplus(x, threshold=20.0, beta=1.0),
    "softplus, one option": lambda x: F.softplus(x, threshold=1.0),
    "softplus, the other option": lambda x: F.softplus(x, beta=3.0),
    "softplus, either way": lambda x: F.softplus(x, 3.0, threshold=2.0),
    "softplus, input by name": lambda x: F.softplus(threshold=1.0, input=x, beta=20.0),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu, input by name": lambda x: F.gelu(approximate="none", input=x),
    "power": lambda x: torch.pow(exponent=3, input=x),
    "square": lambda x: torch.pow(x, exponent=2),
    "of a base": lambda x: torch.pow(2, x) + 2**x,
    "difference": lambda x: torch.sub(x, alpha=3, other=x * x),
    "remainders": lambda x: torch.div(x, 0.25, rounding_mode="floor") * x,
    "elu": lambda x: F.elu(x, inplace=False, alpha=0.3),
    "leaky": lambda x: F.leaky_relu(x, inplace=False, negative_slope=0.3) * x,
    "threshold": lambda x: F.threshold(x, value=3.0, threshold=0.1) * x,
    "hardtanh": lambda x: F.hardtanh(x, max_val=0.2, min_val=-0.1) * x,
    "clamped": lambda x: torch.clamp(x, max=0.3, min=0.0) * x,
    "addcmul": lambda x: torch.addcmul(x, value=3.0, tensor2=x, tensor1=x),
}
REDUCING = {
    "norm": lambda x: torch.linalg.norm(dim=1, input=x),
    "vector norm": lambda x: torch.linalg.vector_norm(dim=1, x=x),
    "norm, by place": lambda x: torch.norm(x, 2, 1),
    "sum": lambda x: torch.sum(dim=1, input=x * x),
    "sum, as of numpy": lambda x: (x * x).sum(axis=1),
    "differences": lambda x: torch.diff(x * x, 1, 1).sum(dim=1),
    "cumulated": lambda x: torch.cumsum(dim=1, input=x * x)[:, 1],
    "variance": lambda x: torch.var(x, 1, False),
    "variance, by name": lambda x: torch.var(x, keepdim=False, correction=2, dim=1),
    "deviation": lambda x: torch.std(x, unbiased=False, dim=1),
    "softmax": lambda x: torch.softmax(x, 1, torch.float64).square().sum(dim=1),
    "softmax, by name": lambda x: F.softmax(dtype=torch.float64, input=x, dim=1).square().sum(dim=1),
    "log sum exp": lambda x: torch.logsumexp(keepdim=True, dim=1, input=x)[:, 0],
    "product": lambda x: torch.prod(dim=1, input=x),
    "joined": lambda x: torch.cat(axis=1, tensors=[x * x, x]).square().sum(dim=1),
    "linear": lambda x: F.linear(weight=ROW[None], input=x * x, bias=ROW[:1])[:, 0],
    "matrix": lambda x: torch.matmul(other=ROW, input=x * x),
    "layer norm": lambda x: F.layer_norm(eps=0.1, normalized_shape=(3,), input=x, weight=ROW).square().sum(dim=1),
    "normalized": lambda x: F.normalize(dim=1, eps=1e-9, input=x)[:, 0],
    "instance norm": lambda x: (
        torch.instance_norm(x[:, None], None, None, None, None, True, 0.1, 1e-3, False).square().sum(dim=(1, 2))
    ),
}


def true_laplacian(f, x):
    return hessian(f, x).diagonal(dim1=1, dim2=2).sum(dim=1)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_laplacians_of_elementwise_functions(name):
    """What was seen to be right far away is not believed nearby."""

    def f(x):
        return ELEMENTWISE[name](x).sum(dim=1)

    for x in (FAR, FAR, NEAR, NEAR, NEAR - 2.0, NEAR + 1.5):
        torch.testing.assert_close(laplacian(f, x), true_laplacian(f, x))


def test_softplus_in_closed_form():
    def f(x):
        return F.softplus(x, threshold=1.0, beta=20.0).sum(dim=1)

    for _ in range(2):
        laplacian(f, FAR)
    x = torch.full((2, 3), 0.03, dtype=torch.float64)
    gate = torch.sigmoid(20 * x)
    torch.testing.assert_close(laplacian(f, x), (20 * gate * (1 - gate)).sum(dim=1))


@pytest.mark.parametrize("number", [2.0, 3.0])
def test_a_power_of_a_number_is_no_power_of_x(number):
    """2 ** x at x = 2 has the value of x ** 2 there, and another derivative."""
    x = torch.full((1, 1), number, dtype=torch.float64)
    expected = 2**number * torch.tensor(2.0).double().log() ** 2
    for _ in range(2):
        torch.testing.assert_close(laplacian(lambda x: torch.pow(2, x)[:, 0], x)[0], expected)


@pytest.mark.parametrize("name", REDUCING)
def test_laplacians_of_reductions(name):
    for x in (NEAR, NEAR, NEAR + 2):
        torch.testing.assert_close(laplacian(REDUCING[name], x), true_laplacian(REDUCING[name], x))


@pytest.mark.parametrize("name", REDUCING | ELEMENTWISE)
def test_divergences(name):
    function = (REDUCING | ELEMENTWISE)[name]

    def field(t, x):
        value = function(x @ MATRIX)
        return value if name in ELEMENTWISE else x * value[:, None]

    for x in (FAR, NEAR, NEAR + 2):
        torch.testing.assert_close(divergence(field, 0.0, x, Exact()), divergence(field, 0.0, x, Autograd()))


MATRIX = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.4, -0.1], [-0.3, 0.2, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize("softmax", [torch.softmax, F.softmax, torch.log_softmax, F.log_softmax])
def test_softmax_to_another_dtype_keeps_it(softmax):
    x, seen = NEAR.float(), []

    def f(x):
        value = softmax(x, 1, dtype=torch.float64)
        seen.append(value.dtype)
        return value.square().sum(dim=1).float()

    for _ in range(2):
        torch.testing.assert_close(laplacian(f, x), true_laplacian(f, x))
    assert set(seen) == {torch.float64}


def test_instance_norm_of_torch_itself_has_another_order():
    net = nn.Linear(6, 6).double()
    mean, variance = torch.tensor([0.5, 1.0]).double(), torch.tensor([2.0, 3.0]).double()

    def field(t, x):
        y = net(x).view(-1, 2, 3)
        return torch.instance_norm(y, None, None, mean, variance, False, 0.1, 1e-5, False).tanh().reshape(x.shape)

    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))

"""What either reader of a tape knows, the other knows: values against central differences, without products of any operation's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Exact, FieldError, divergence
from divflow.operators import explain_laplacian, laplacian, value_gradient_laplacian
from divflow.tape.table import RULES

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(3, 6, dtype=torch.float64, generator=NOISE)
W = torch.randn(6, 6, dtype=torch.float64, generator=NOISE) / 2
V = torch.randn(6, dtype=torch.float64, generator=NOISE)
A, B = (torch.randn(3, 3, dtype=torch.float64, generator=NOISE) for _ in range(2))
NORM = nn.BatchNorm1d(6).double().eval()
NORM.running_mean.copy_(V / 3)
NORM.running_var.copy_(V.square() + 0.5)


def conv(h, dims):
    """A convolution of six entries as a row, an image or a volume."""
    shape = {1: (6,), 2: (2, 3), 3: (1, 2, 3)}[dims]
    weight = torch.linspace(-1, 1, 3**dims, dtype=h.dtype).view(1, 1, *[3] * dims)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return function(h.view(-1, 1, *shape), weight, torch.ones(1, dtype=h.dtype), padding=1).flatten(1)


# Functions of h `(k, 6)` with values `(k, n)`, by the operation that they are there for.
OPERATIONS = {
    "amax": lambda h: h.amax(dim=1, keepdim=True),
    "amin": lambda h: h.view(-1, 2, 3).amin(dim=2),
    "rms_norm": lambda h: F.rms_norm(h, (6,), V, 1e-3),
    "group_norm": lambda h: F.group_norm(h, 2, V, -V, eps=1e-3),
    "instance_norm": lambda h: F.instance_norm(h.view(-1, 2, 3), eps=1e-2).flatten(1),
    "layer_norm": lambda h: F.layer_norm(h.view(-1, 2, 3), (3,), V[:3], V[3:], 1e-2).flatten(1),
    "batch_norm": NORM,
    "var_mean": lambda h: torch.cat(torch.var_mean(h, 1, keepdim=True), dim=1),
    "var_mean, unbiased": lambda h: torch.cat(torch.var_mean(h, 1, unbiased=False, keepdim=True), dim=1),
    "var_mean, in order": lambda h: torch.cat(torch.var_mean(h, 1, False, True), dim=1),
    "std_mean": lambda h: torch.cat(torch.std_mean(h, 1, correction=0, keepdim=True), dim=1),
    "var": lambda h: torch.var(h.view(-1, 2, 3), dim=2, unbiased=False),
    "std": lambda h: h.std(1, keepdim=True),
    "softmin": lambda h: F.softmin(h, dim=1),
    "softmax": lambda h: h.view(-1, 2, 3).softmax(dim=-1).flatten(1),
    "log_softmax": lambda h: h.log_softmax(dim=1),
    "logsumexp": lambda h: h.view(-1, 2, 3).logsumexp((1, 2))[:, None],
    "prod": lambda h: h.view(-1, 2, 3).prod(dim=2),
    "norm": lambda h: h.norm(dim=1, keepdim=True),
    "linalg_norm": lambda h: torch.linalg.norm(h.view(-1, 2, 3), dim=2),
    "linalg_vector_norm": lambda h: torch.linalg.vector_norm(h, dim=1, keepdim=True),
    "normalize": lambda h: F.normalize(h, dim=1),
    "sum": lambda h: h.sum(dim=1, keepdim=True),
    "mean": lambda h: h.view(-1, 2, 3).mean(dim=1),
    "glu": lambda h: F.glu(h, dim=1),
    "slogdet": lambda h: torch.linalg.slogdet(h[:, None, :3] * A + torch.eye(3) * 4).logabsdet[:, None],
    "logdet": lambda h: torch.logdet(h.view(-1, 2, 3) @ A @ h.view(-1, 2, 3).mT * 0 + torch.eye(2) * 3 + h[:, :1, None] * 0.1)[:, None],
    "bmm": lambda h: torch.bmm(A.expand(len(h), 3, 3), h.view(-1, 3, 2)).flatten(1),
    "mv": lambda h: torch.mv(h, V)[:, None],
    "addmm": lambda h: torch.addmm(V, h, W, alpha=0.5),
    "matmul": lambda h: (A @ h.view(-1, 3, 2)).flatten(1),
    "einsum": lambda h: torch.einsum("bi,ij->bj", h, W),
    "tensordot": lambda h: torch.tensordot(h, W, dims=1),
    "kron": lambda h: torch.kron(h, V[None, :2])[:, :6],
    "cross": lambda h: torch.cross(h.view(-1, 2, 3), A[None, :2].expand(len(h), 2, 3), dim=2).flatten(1),
    "vecdot": lambda h: torch.linalg.vecdot(h, V.expand(len(h), 6))[:, None],
    "cumsum": lambda h: h.cumsum(dim=1),
    "diff": lambda h: h.diff(dim=1),
    "tril": lambda h: h[:, None].expand(-1, 6, 6).tril().sum(2),
    "conv1d": lambda h: conv(h, 1),
    "conv2d": lambda h: conv(h, 2),
    "conv3d": lambda h: conv(h, 3),
    "linear": lambda h: F.linear(h, W, V),
    "dropout": lambda h: F.dropout(h, 0.3, training=False),
    "softplus": F.softplus,
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
    "mish": F.mish,
    "atan2": lambda h: torch.atan2(h, 1 + h * h),
}  # fmt: skip


def field_of(part):
    """A field in which an operation is between layers, of as many entries as it makes."""
    n = part(X).shape[1]
    last = torch.linspace(-1, 1, 6 * n, dtype=X.dtype).view(n, 6).sin()
    return lambda t, x: part((x @ W).sin() + x).tanh() @ last + x * x


def scalar_of(part):
    field = field_of(part)
    return lambda x: (field(0.0, x).sin() * V).sum(1)


def by_differences(function, x, step, order):
    """The sum over the dimensions of the diagonal's first or second differences."""
    total = 0.0
    for i in range(x.shape[1]):
        e = torch.zeros_like(x)
        e[:, i] = step
        if order == 1:
            total = total + (function(x + e) - function(x - e))[:, i] / (2 * step)
        else:
            total = total + (function(x + e) - 2 * function(x) + function(x - e)) / step**2
    return total


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_divergence_has_a_closed_form(name):
    field = field_of(OPERATIONS[name])
    expected = by_differences(lambda x: field(0.0, x), X, 1e-6, 1)
    for _ in range(2):
        torch.testing.assert_close(divergence(field, 0.0, X, Exact("layered")), expected, rtol=1e-7, atol=1e-7)
    why = Exact("layered").explain(field, 0.0, X).why
    # A matrix for each sample, a mixed-up one: these have no matrix that the batch shares.
    assert ("products of its own" in why) == (name in ("bmm", "cross", "vecdot", "logdet")), why


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_laplacian_is_carried_forward(name):
    f = scalar_of(OPERATIONS[name])
    plan = explain_laplacian(f, X)
    assert plan.method == "forward_laplacian", plan.why
    assert "products of its own" not in plan.why
    expected = by_differences(f, X, 1e-4, 2)
    for _ in range(2):
        torch.testing.assert_close(laplacian(f, X), expected, rtol=1e-5, atol=1e-5)
    _, gradient, _ = value_gradient_laplacian(f, X)
    slopes = torch.stack([(f(X + e) - f(X - e)) / 2e-6 for e in 1e-6 * torch.eye(6, dtype=X.dtype)], dim=1)
    torch.testing.assert_close(gradient, slopes, rtol=1e-7, atol=1e-7)


def test_a_deviation_of_equal_entries_has_autograds_convention():
    """Its derivatives are zero there."""
    x = torch.cat([torch.zeros(1, 6), X[:2]]).double()
    f = lambda x: OPERATIONS["std"](x).sum(1)  # noqa: E731
    _, gradient, lap = value_gradient_laplacian(f, x)
    assert gradient[0].eq(0).all()
    assert lap[0] == 0
    torch.testing.assert_close(lap[1:], by_differences(f, x[1:], 1e-4, 2), rtol=1e-5, atol=1e-5)


def test_one_table():
    """Names of operations stand in it once, and both readers take their rules from there."""
    assert len(RULES) > 200
    assert {"amax", "bmm", "conv2d", "rms_norm", "linalg_slogdet"} <= RULES.keys()
    with pytest.raises(FieldError, match=r"not layered|does not apply"):
        divergence(lambda t, x: torch.zeros_like(x).index_copy_(1, torch.arange(6), x), 0.0, X, Exact("layered"))

"""Functions that the forward Laplacian must not follow, or might follow wrongly: exact all the same, at every point."""

import re
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Autograd, FieldError, check_field
from divflow.operators import explain_laplacian, gradient, laplacian, value_gradient_laplacian
from divflow.tape import Elementwise
from divflow.tape.movements import Movement
from divflow.tape.table import RULES
from divflow.verification import severed_fields


@pytest.fixture(autouse=True)
def _derivatives_are_those_of_autograd():
    """Whatever is detached, or changed by a hook: the ways to a Laplacian are compared with one another."""
    with severed_fields("allow"):
        yield


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 * ctx.saved_tensors[0] ** 2


def through_a_view(x):
    y = x * 2
    y[:, :3].mul_(x[:, :3])
    return y.sin().sum(1)


def inner_gradient(x):
    z = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad((z**4).sum(), z, create_graph=True)[0]


def hooked(x):
    h = torch.tanh(x @ W)
    h.register_hook(lambda gradient: gradient * 2)
    return (h @ W).sin().sum(1)


def changed_later(x):
    y = x.sort(dim=1).values
    y.mul_(2)
    return (y @ W).sin().sum(1)


@torch.jit.script
def scripted(x):
    return x * x


NOT_FOLLOWED = {
    "a view that is changed": (through_a_view, "through another view"),
    "changed after an operation without a rule": (changed_later, "a change in place of a value"),
    "a hook": (hooked, "register_hook has no rule"),
    "written into a buffer": (lambda x: torch.zeros_like(x).index_copy_(1, torch.arange(6), x).sin().sum(1), "index_copy_"),
    "complex": (lambda x: torch.view_as_real(torch.exp(1j * x)).prod(dim=2).sum(1), "complex|has no rule|cover"),
}  # fmt: skip
# Without a rule: taken for a part of a larger function, so that its own products are the lesser part.
OPAQUE = {
    "a custom function": (Cube.apply, "CubeBackward is hidden from torch functions"),
    "scripted": (scripted, "is hidden from torch functions"),
    "a gradient inside": (inner_gradient, "hidden from torch functions"),
    "vmap inside": (torch.func.vmap(lambda z: z * z), "hidden|has no rule"),
    "sorted": (lambda x: x.sort(dim=1).values, "sort has no rule"),
    "another norm": (lambda x: x.norm(3, dim=1, keepdim=True), "norm has no rule"),
    "the norm of a matrix": (lambda x: torch.linalg.norm(x.view(-1, 2, 3), ord=2, dim=(1, 2))[:, None], "norm has no rule"),
    "a scan": (lambda x: torch.cumprod(1 + x * x, dim=1), "cumprod has no rule"),
    "the largest of all": (lambda x: x.max(dim=1).values[:, None], "max has no rule"),
}  # fmt: skip


def check(f, x):
    """Against the loop, in all modes; what has no second derivatives at all is none of these."""
    value, divergence = Autograd()(lambda _, z: gradient(f, z), 0.0, x)
    found = value_gradient_laplacian(f, x)
    torch.testing.assert_close(found.gradient, value)
    torch.testing.assert_close(found.laplacian, divergence)
    with torch.no_grad():
        torch.testing.assert_close(laplacian(f, x), divergence.detach())


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_can_not_be_followed_is_exact_all_the_same(name):
    f, why = NOT_FOLLOWED[name]
    for x in (X, 2 * X, 2 * X + 1, X):
        check(f, x)
    plan = explain_laplacian(f, X)
    assert plan.method == "reverse"
    assert re.search(why, plan.why), plan.why


@pytest.mark.parametrize("name", OPAQUE)
def test_what_has_no_rule_is_carried_through_by_its_own_products(name):
    part, why = OPAQUE[name]
    generator = torch.Generator().manual_seed(2)
    first, last = (torch.randn(n, m, dtype=X.dtype, generator=generator) / 4 for n, m in ((6, 64), (64, 6)))

    def f(x):
        h = x
        for _ in range(8):  # what is followed is the larger part
            h = h + (h @ first).tanh() @ last
        return (part(h) * h).sin().sum(1)

    plan = explain_laplacian(f, X)
    assert plan.method == "forward_laplacian"
    assert re.search(why, plan.why), plan.why
    assert "evaluations" in plan.why
    for x in (X, 2 * X, X + 1, X):
        check(f, x)
    x, gradients = X.clone().requires_grad_(), []
    for way in (laplacian, lambda f, x: Autograd()(lambda _, z: gradient(f, z), 0.0, x).divergence):
        gradients.append(torch.autograd.grad(way(f, x).sum(), x)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", sorted(set(OPAQUE) - {"a scan"}))  # which is as cheap as what is around it
def test_where_that_is_dearer_dense_products_are_taken(name):
    part, why = OPAQUE[name]
    f = lambda x: (part(x) * torch.linspace(0, 1, 6, dtype=x.dtype)).sum(1)  # noqa: E731
    plan = explain_laplacian(f, X)
    assert plan.method == "reverse"
    assert re.search(f"takes longer.*({why})", plan.why), plan.why
    for x in (X, 2 * X, X + 1, X):
        check(f, x)


def test_branches_on_values():
    """Another branch is another structure; a choice an entry is `where`."""

    def f(x):
        h = torch.tanh(x @ W) if x.sum() > 0 else Cube.apply(x) if x[0, 0] > 1 else x.sin() * x
        return torch.where(h > 0, h * h, h.exp()).sum(1)

    for x in (X.abs(), -X.abs(), X.abs(), 2 - 3 * torch.eye(6, dtype=X.dtype)[:4] * X.abs(), X.abs(), -X.abs() - 5):
        check(f, x)
    y = -10 * torch.ones_like(X)
    y[0, 0] = 2
    for _ in range(3):
        check(f, y)


class Changing(nn.Module):
    """A function whose constants are changed between calls."""

    def __init__(self, function, **values):
        super().__init__()
        self.function, self.values = function, values
        self.turn(0)

    def turn(self, turn):
        for name, choices in self.values.items():
            setattr(self, name, choices[turn])

    def forward(self, x):
        return self.function(self, x)


CHANGING = {
    "numbers": Changing(lambda m, x: (x * m.a + x**m.p).sum(1).sin(), a=(1.0, 3.0), p=(3, 3.0)),
    "powers": Changing(lambda m, x: (x**m.p).sum(1), p=(2.0, 4.0)),
    "a slope": Changing(lambda m, x: F.leaky_relu(x @ W, m.a).square().sum(1), a=(0.1, 0.5)),
    "indices": Changing(lambda m, x: x[:, m.i].prod(1), i=(torch.tensor([0, 1]), torch.tensor([2, 2]))),
    "masks": Changing(lambda m, x: (x * x)[:, m.i].sum(1), i=(torch.tensor([True] * 3 + [False] * 3),) * 2),
    "zeros": Changing(lambda m, x: (torch.tanh(x @ W) * m.a).sum(1), a=(torch.zeros(6), torch.ones(6))),
    "a function": Changing(lambda m, x: m.f(x @ W).sum(1), f=(torch.tanh, torch.sin)),
    "a custom function": Changing(lambda m, x: m.f(x @ W).sum(1), f=(torch.tanh, Cube.apply)),
    "a custom function that is zero": Changing(
        lambda m, x: (x * x + m.a * Cube.apply(x)).sum(1), a=(torch.zeros(()), torch.ones(()))
    ),
    "the wiring": Changing(
        lambda m, x: (lambda a, b: (a * (b if m.w else a)).sum(1))(x.sin(), x.cos()), w=(False, True)
    ),
    "an output": Changing(lambda m, x: (lambda a, b: b if m.w else a)(x.sum(1), x.prod(1)), w=(False, True)),
}


@pytest.mark.parametrize("name", CHANGING)
def test_after_a_change(name):
    f = CHANGING[name]
    for turn in (0, 0, 0, 1, 1, 0, 1):
        f.turn(turn)
        check(f, X)


class Stateful(nn.Module):
    """Counts its calls, and is another function at every second one."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (x @ W).sin().sum(1) if self.calls % 2 else (x.flip(1) * x).exp().sum(1)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_function_that_changes_itself_has_the_laplacian_of_one_evaluation(mode):
    f, expected = Stateful(), []
    for calls in (1, 2):
        g = Stateful()
        g.calls = calls - 1
        expected.append(Autograd()(lambda _, z, g=g: gradient(g, z), 0.0, X).divergence.detach())
    for _ in range(6):
        with mode():
            lap = laplacian(f, X).detach()
        torch.testing.assert_close(lap, expected[(f.calls - 1) % 2])


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x - x.mean(dim=0)).square().sum(1),
        lambda x: F.batch_norm(x, None, None, training=True).square().sum(1),
        lambda x: (x @ x.T).sum(1),
    ],
)
def test_mixed_samples_are_refused(f):
    with pytest.raises(FieldError, match=r"mixes the samples.*\(4, 6\).*dimension 0"):
        laplacian(f, X)
    with pytest.raises(FieldError, match="mixes the samples"):
        check_field(lambda t, x: gradient(f, x), 0.0, X)


def test_a_wrong_rule_is_found_at_its_operation(monkeypatch):
    """Where a last layer of zeros hides it from the function's own derivatives, too."""
    monkeypatch.setitem(RULES, "tan", Movement())
    monkeypatch.setitem(RULES, "sinh", Elementwise(slope=lambda u: u.cosh(), curvature=lambda u: u.cosh()))
    last = torch.zeros(6, dtype=X.dtype)
    f = lambda x: (torch.tan(x / 5) * last).sum(1)  # noqa: E731
    check(f, X)
    assert explain_laplacian(f, X).why == "dense products: the derivative of tan differs"
    last += 1
    check(f, X)
    check(lambda x: x.sinh().sum(1), torch.zeros_like(X))  # right to first order there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_take_products(dtype):
    net = nn.Linear(6, 6)
    f = lambda x: net(x).tanh().sum(1)  # noqa: E731
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert explain_laplacian(f, x).method == "reverse"
        torch.testing.assert_close(laplacian(f, x), laplacian(f, x))
    net.to(dtype)
    assert explain_laplacian(f, x.to(dtype)).method == "reverse"
    torch.testing.assert_close(
        laplacian(f, x.to(dtype)).float(), laplacian(lambda x: f(x), x.to(dtype)).float(), rtol=0.1, atol=0.1
    )


def test_infinite_at_first():
    f = lambda x: x.log().sum(1)  # noqa: E731
    assert not laplacian(f, torch.zeros_like(X)).isfinite().any()
    check(f, X.abs())
    assert explain_laplacian(f, X).method == "forward_laplacian"


def test_fresh_functions_of_one_kind_are_verified_once(monkeypatch):
    """A lambda over new tensors at each step, as a training loop has it."""
    calls = []
    monkeypatch.setattr("divflow.operators.forward_laplacian.forward._verify", lambda *args: calls.append(args))
    for _ in range(4):
        t = torch.rand(4, 1, dtype=X.dtype)
        laplacian(lambda x, t=t: (x * t).square().sum(1).tan(), X)
    assert len(calls) == 1


def test_from_several_threads_at_once():
    net, failures = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)).double(), []
    points = [torch.randn(1 + i % 4, 6, dtype=X.dtype) for i in range(12)]
    expected = [Autograd()(lambda _, z: gradient(net, z), 0.0, x).divergence.detach() for x in points]

    def work(scale):
        try:
            for x, true in zip(points, expected, strict=True):
                torch.testing.assert_close(laplacian(lambda x: scale * net(x), x).detach(), scale * true)
        except BaseException as error:  # it would end with the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures

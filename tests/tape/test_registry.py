"""Rules of a user's own: taken wherever the function is called, verified like all others, refused where they are wrong."""

import inspect

import pytest
import torch
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, Hutchinson, divergence, value_and_divergence
from divflow.operators import explain_laplacian, gradient, laplacian
from divflow.tape import Elementwise, Linear, RuleError, Written, register, unregister

GENERATOR = torch.Generator().manual_seed(0)
W, V = (torch.randn(n, m, dtype=torch.float64, generator=GENERATOR) / 3 for n, m in ((6, 16), (16, 6)))
R = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=GENERATOR)).Q
X = torch.randn(4, 6, dtype=torch.float64, generator=GENERATOR)


class Swish(torch.autograd.Function):
    """As a fused kernel has it: the forward pass is hidden from torch functions."""

    @staticmethod
    def forward(ctx, u, beta):
        ctx.save_for_backward(u)
        ctx.beta = beta
        return u * torch.sigmoid(beta * u)

    @staticmethod
    def backward(ctx, gradient):
        (u,) = ctx.saved_tensors
        return gradient * swish_slope(u, ctx.beta), None


def swish_slope(u, beta=1.0):
    gate = torch.sigmoid(beta * u)
    return gate + beta * u * gate * (1 - gate)


def swish_curvature(u, beta=1.0):
    gate = torch.sigmoid(beta * u)
    return beta * gate * (1 - gate) * (2 + beta * u * (1 - 2 * gate))


def swish(u, beta=1.0):
    return Swish.apply(u, beta)


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return u @ R

    @staticmethod
    def backward(ctx, gradient):
        return Rotation.apply(gradient @ R.T @ R.T)


def rotate(u):
    return Rotation.apply(u)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight):
        ctx.save_for_backward(u, weight)
        return written_norm(u, weight)

    @staticmethod
    def backward(ctx, gradient):
        u, weight = ctx.saved_tensors
        scale = (u.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        inner = gradient * weight
        return scale * inner - u * scale**3 * (u * inner).mean(-1, keepdim=True), (gradient * u * scale).sum(0)


def written_norm(u, weight):
    return u * (u.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight


def fused_norm(u, weight):
    return Norm.apply(u, weight)


@torch.library.custom_op("divflow_tests::cube", mutates_args=())
def cube(u: torch.Tensor) -> torch.Tensor:
    return u**3


cube.register_autograd(
    lambda ctx, gradient: gradient * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
WEIGHT = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)
CASES = {
    "elementwise": (swish, Elementwise(swish_slope, swish_curvature), swish),
    "elementwise with an option": (swish, Elementwise(swish_slope, swish_curvature), lambda u: swish(u, 1.5)),
    "elementwise, its curvature by autograd": (swish, Elementwise(swish_slope), lambda u: swish(u, beta=0.7)),
    "linear": (rotate, Linear(0), rotate),
    "written": (fused_norm, Written(written_norm), lambda u: fused_norm(u, WEIGHT)),
    "an operator of torch.library": (cube, Elementwise(lambda u: 3 * u**2, lambda u: 6 * u), cube),
    "by its overload": (torch.ops.divflow_tests.cube, Elementwise(lambda u: 3 * u**2), torch.ops.divflow_tests.cube),
    "a torch function": (torch.special.i0, Elementwise(torch.special.i1), lambda u: torch.special.i0(u / 4)),
    "an autograd.Function": (Swish, Elementwise(swish_slope), lambda u: Swish.apply(u, 1.0)),
}


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    for function, _, _ in CASES.values():
        try:
            unregister(function)
        except FieldError:
            continue


def field_of(part):
    return lambda t, x: part(x @ W + t).sin() @ V + x


@pytest.mark.parametrize("name", CASES)
def test_a_closed_form_is_kept(name):
    function, rule, part = CASES[name]
    field = field_of(part)
    expected = divergence(field, 0.3, X, Autograd())
    plain = part(X @ W)
    register(function, rule)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            for _ in range(3):
                torch.testing.assert_close(divergence(field, 0.3, X, Exact("layered")).detach(), expected)
    plan = Exact("layered").explain(field, 0.3, X)
    assert "products of its own" not in plan.why
    assert torch.equal(part(X @ W), plain)  # what is outside of a field is as ever
    unregister(function)
    assert torch.equal(part(X @ W), plain)
    assert "products of its own" in Exact("layered").explain(lambda t, x: field(t, x) * 1, 0.3, X).why


@pytest.mark.parametrize("name", sorted(set(CASES) - {"written"}))  # whose backward is written for first derivatives
def test_a_laplacian_is_carried_through(name):
    function, rule, part = CASES[name]

    def f(x):
        return (part(x @ W).sin() @ V).square().sum(1)

    expected = Autograd()(lambda _, z: gradient(f, z), 0.0, X).divergence
    register(function, rule)
    for _ in range(3):
        torch.testing.assert_close(laplacian(f, X), expected)
    plan = explain_laplacian(f, X)
    assert plan.method == "forward_laplacian"
    assert "products of its own" not in plan.why


def test_gradients_of_the_divergence():
    register(swish, Elementwise(swish_slope, swish_curvature))
    gradients = []
    for estimator in (Autograd(), Exact("layered")):
        x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
        value = divergence(lambda t, x, w=weight: swish(x @ w) @ V, 0.0, x, estimator)
        gradients.append(torch.autograd.grad((value * torch.arange(1, 5)).sum(), [x, weight]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_value_stays_the_fused_one():
    """Bit for bit, though the function is written in another way."""
    other = lambda u, weight: u * weight / (u.square().sum(-1, keepdim=True) / 16 + 1e-3).sqrt()  # noqa: E731
    register(fused_norm, Written(other))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, _ = value_and_divergence(lambda t, x: fused_norm(x @ W, WEIGHT) @ V, 0.0, x, Exact("layered"))
    unregister(fused_norm)
    assert torch.equal(value, fused_norm(x @ W, WEIGHT) @ V)


WRONG = {
    "a slope": (swish, Elementwise(lambda u, beta=1.0: swish_slope(u, beta) + 0.01), swish),
    "a slope of another shape": (swish, Elementwise(lambda u, beta=1.0: u.sum(0)), swish),
    "a slope that fails": (swish, Elementwise(lambda u: u), lambda u: swish(u, 1.0)),
    "no linear function": (swish, Linear(0), swish),
    "another value": (fused_norm, Written(lambda u, weight: u * weight), lambda u: fused_norm(u, WEIGHT)),
    "another derivative": (
        fused_norm,
        Written(lambda u, weight: written_norm(u, weight) + 0.01 * (u - u.detach())),
        lambda u: fused_norm(u, WEIGHT),
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("last", [V, torch.zeros_like(V)], ids=["a layer", "a layer of zeros"])
def test_a_wrong_rule_is_refused(name, last):
    function, rule, part = WRONG[name]

    def field(t, x):
        return part(x @ W) @ last

    register(function, rule)
    for _ in range(2):
        with pytest.raises(RuleError, match=r"rule that was registered for .*(swish|fused_norm)"):
            divergence(field, 0.0, X)
    assert issubclass(RuleError, FieldError)
    unregister(function)
    torch.testing.assert_close(divergence(field, 0.0, X), divergence(field, 0.0, X, Autograd()))


def test_a_wrong_curvature_is_refused_by_the_laplacian():
    register(swish, Elementwise(swish_slope, lambda u, beta=1.0: 2 * swish_curvature(u, beta)))
    with pytest.raises(RuleError, match=r"swish is wrong: .* the rule gives .* where autograd finds"):
        laplacian(lambda x: swish(x @ W).sum(1), X)


def test_a_rule_that_does_not_cover_a_call_costs_its_own_products():
    """Linear in its first argument, of a call in which the second depends on x, too."""

    def scaled(u, v):
        return (u * v).clone()

    register(scaled, Linear(0))
    try:
        field = lambda t, x: scaled(x @ W, x @ W) @ V  # noqa: E731
        torch.testing.assert_close(divergence(field, 0.0, X), divergence(field, 0.0, X, Autograd()))
        assert "linear in its argument 0 alone" in Exact("layered").explain(field, 0.0, X).why
        field = lambda t, x: scaled(x @ W, torch.ones(16, dtype=x.dtype)) @ V  # noqa: E731
        assert "products of its own" not in Exact("layered").explain(field, 0.0, X).why
    finally:
        unregister(scaled)


def test_every_reference_to_a_function_is_seen():
    """One that was made before, a method's, a closure's; with defaults and keywords."""
    scale = 2.0

    def scaled(u, *, power=3):
        return Power.apply(u, power) * scale

    class Power(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, power):
            ctx.save_for_backward(u)
            ctx.power = power
            return u**power

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.power * ctx.saved_tensors[0] ** (ctx.power - 1), None

    held = [scaled]
    register(scaled, Elementwise(lambda u, power=3: scale * power * u ** (power - 1)))
    try:
        for part in (held[0], lambda u: held[0](u, power=2)):
            field = field_of(part)
            torch.testing.assert_close(divergence(field, 0.3, X), divergence(field, 0.3, X, Autograd()))
            assert "products of its own" not in Exact("layered").explain(field, 0.3, X).why
    finally:
        unregister(scaled)
    torch.testing.assert_close(scaled(X), 2 * X**3)


def test_other_estimators_take_no_notice():
    register(swish, Elementwise(swish_slope))
    field, generator = field_of(swish), torch.Generator()
    with_rule = divergence(field, 0.3, X, lambda g, t, x: Hutchinson()(g, t, x, generator.manual_seed(0)))
    unregister(swish)
    without = divergence(field, 0.3, X, lambda g, t, x: Hutchinson()(g, t, x, generator.manual_seed(0)))
    assert torch.equal(with_rule, without)


async def waited(u):
    return u


REFUSED = {
    "no rule": (swish, lambda u: u, "rule must be an Elementwise"),
    "an object": (nn.Tanh(), Linear(0), "can't be registered"),
    "a coroutine": (waited, Linear(0), "a generator or a coroutine"),
    "a number": (3, Linear(0), "can't be registered"),
    "what has a rule": (torch.tanh, Elementwise(lambda u: 1 - u.tanh() ** 2), "divflow's own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_registered_is_refused(name):
    function, rule, message = REFUSED[name]
    with pytest.raises(FieldError, match=message):
        register(function, rule)


def test_registered_twice_or_not_at_all():
    register(swish, Elementwise(swish_slope))
    with pytest.raises(FieldError, match="has a rule already; unregister it first"):
        register(swish, Linear(0))
    unregister(swish)
    with pytest.raises(FieldError, match="has no registered rule"):
        unregister(swish)


def test_a_registered_function_is_compiled_as_before():
    def cubed(u, power=3):
        return u**power

    net = lambda x: cubed(x) + 1  # noqa: E731
    signature = inspect.signature(cubed)
    register(cubed, Elementwise(slope=lambda u, power=3: power * u ** (power - 1)))
    try:
        assert inspect.signature(cubed) == signature
        torch.testing.assert_close(torch.compile(net, backend="eager")(X), X**3 + 1)
        compiled = torch.compile(lambda t, x: cubed(x @ W) @ V, backend="eager")
        torch.testing.assert_close(divergence(compiled, 0.0, X), divergence(lambda t, x: (x @ W) ** 3 @ V, 0.0, X))
    finally:
        unregister(cubed)
    assert inspect.signature(cubed) == signature

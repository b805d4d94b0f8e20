"""Within torch.func's transforms and torch.compile: the same numbers as without, or one error of divflow's own."""

import contextlib

import pytest
import torch
from catalogue import Network
from torch import Generator, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from divflow import operators
from divflow.divergence import (
    Autograd,
    ControlVariate,
    Estimator,
    Exact,
    FieldError,
    Hutchinson,
    HutchPlusPlus,
    XTrace,
    check_field,
    divergence,
    value_and_divergence,
)
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented
from divflow.matching import ConditionalFlowMatching
from divflow.networks import MLPPotential
from divflow.score.objectives import DenoisingScoreMatching, ImplicitScoreMatching, SlicedScoreMatching
from divflow.solver import Solver


class OfOnesOwn(Estimator):
    def estimate(self, g, t, x, generator=None):
        return Autograd().estimate(g, t, x)


EXACT = {
    "auto": Exact(),
    "in chunks": Exact(chunk_size=2),
    "layered": Exact("layered"),
    "colored": Exact("colored"),
    "reverse": Exact("reverse"),
    "forward": Exact("forward"),
    "autograd": Autograd(),
    "one's own": OfOnesOwn(),
}
STOCHASTIC = {
    "rademacher": Hutchinson(2),
    "gaussian": Hutchinson(2, "gaussian"),
    "sphere": Hutchinson(2, "sphere"),
    "hutch++": HutchPlusPlus(3),
    "xtrace": XTrace(4),
    "control variate": ControlVariate(Hutchinson(2), torch.randn(2, 6).double(), rank=1),
}
NET = Network((6,))
X = torch.randn(4, 6, generator=Generator().manual_seed(0), dtype=torch.float64)
EXPECTED = divergence(NET, 0.5, X, Autograd()).detach()
SLOPE = operators.gradient(lambda z: divergence(NET, 0.5, z, Autograd()), X).detach()


def test_the_slope_is_that_of_differences():
    e = torch.zeros_like(X)
    e[1, 2] = 1e-5
    ahead, behind = (divergence(NET, 0.5, X + sign * e, Autograd())[1] for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / 2e-5, SLOPE[1, 2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_exact_divergences(name):
    def total(z):
        return divergence(NET, 0.5, z, EXACT[name])

    def of_one(z):
        return total(z[None])[0]

    diagonal = torch.zeros(4, 4, 6, dtype=torch.float64)
    diagonal[range(4), range(4)] = SLOPE
    close = torch.testing.assert_close
    close(torch.vmap(of_one)(X), EXPECTED)
    close(torch.vmap(of_one, chunk_size=3)(X), EXPECTED)
    close(torch.vmap(torch.vmap(of_one))(X.view(2, 2, 6)), EXPECTED.view(2, 2))
    close(grad(lambda z: total(z).sum())(X), SLOPE)
    close(torch.vmap(grad(of_one))(X), SLOPE)
    close(jacrev(total)(X), diagonal)
    close(jvp(total, (X,), (torch.ones_like(X),))[1], SLOPE.sum(dim=1))
    close(vjp(total, X)[1](torch.ones(4).double())[0], SLOPE)
    close(
        torch.vmap(hessian(of_one))(X),
        operators.hessian(lambda z: divergence(NET, 0.5, z, Autograd()), X).detach(),
    )
    with torch.inference_mode():
        close(torch.vmap(of_one)(X), EXPECTED)
    of_times = torch.vmap(lambda t, z: divergence(NET, t, z[None], EXACT[name])[0])
    close(of_times(torch.full((4,), 0.5).double(), X), EXPECTED)


@pytest.mark.parametrize("name", sorted((EXACT | STOCHASTIC).keys() - {"colored"}))
def test_parameters(name):
    """The derivative by torch.func is that of a backward pass, with the same random numbers."""
    estimator, parameters = (EXACT | STOCHASTIC)[name], dict(NET.named_parameters())

    def total(p):
        return estimator(lambda t, z: functional_call(NET, p, (t, z)), 0.5, X, Generator().manual_seed(0)).divergence

    expected = torch.autograd.grad(total(parameters).sum(), list(parameters.values()), materialize_grads=True)
    for found, true in zip(grad(lambda p: total(p).sum())(parameters).values(), expected, strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_estimates(name):
    estimator = STOCHASTIC[name]

    def of_one(z):
        return divergence(NET, 0.5, z[None], estimator)[0]

    with pytest.raises(FieldError, match="whole batch"):
        torch.vmap(of_one)(X)
    rows = X[:1].expand(4000, 6)
    samples = torch.vmap(of_one, randomness="different")(rows).detach()
    assert (samples.mean() - EXPECTED[0]).abs() < 4 * samples.std() / 4000**0.5 + 1e-9
    if name == "control variate":
        return  # it draws afresh where the batch is another
    frozen = estimator.freeze(X[:1], Generator().manual_seed(0))
    found = torch.vmap(lambda z: divergence(NET, 0.5, z[None], frozen)[0])(X)
    expected = [divergence(NET, 0.5, row[None], frozen)[0] for row in X]
    torch.testing.assert_close(found, torch.stack(expected))


LAYERS = {
    "normalized": (nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 6)), (6,)),
    "images": (
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1)),
        (1, 4, 4),
    ),
    "attention": (lambda z: F.scaled_dot_product_attention(z, z.sin(), z.square()), (5, 4)),
    "in place": (lambda z: z.mul_(2).tanh_().mul(z), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_other_fields(name):
    net, event = LAYERS[name]
    x = torch.randn(3, *event)

    def total(z):
        return divergence(lambda t, y: net(y), 0.0, z)

    expected = divergence(lambda t, y: net(y), 0.0, x, Autograd()).detach()
    slope = operators.gradient(lambda z: divergence(lambda t, y: net(y), 0.0, z, Autograd()), x).detach()
    before = x.clone()
    torch.testing.assert_close(torch.vmap(lambda z: total(z[None])[0])(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(grad(lambda z: total(z[None])[0]))(x), slope, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grad(lambda z: total(z).sum())(x), slope, rtol=1e-3, atol=1e-4)
    assert torch.equal(x, before)


def scalar(z):
    return z.sin().prod(dim=1) + (z**3).sum(dim=1)


OPERATORS = {
    "gradient": lambda z: operators.gradient(scalar, z),
    "complex gradient": lambda z: operators.gradient(lambda y: scalar(y) * (1 + 2j), z).imag,
    "hessian": lambda z: operators.hessian(scalar, z).flatten(1),
    "laplacian": lambda z: operators.laplacian(scalar, z)[:, None],
    "complex laplacian": lambda z: operators.laplacian(lambda y: scalar(y) * (1 + 2j), z).imag[:, None],
    "its value": lambda z: operators.value_gradient_laplacian(scalar, z).value[:, None],
    "its gradient": lambda z: operators.value_gradient_laplacian(scalar, z).gradient,
    "jacobian": lambda z: operators.jacobian(lambda t, y: y**2 * y.roll(1, 1), 0.0, z).flatten(1),
    "partial": lambda z: operators.partial_derivative(lambda a, b: a**2 * b, [z, z.detach()], wrt=0),
    "flat": lambda z: operators.flat_gradient(lambda a: (a**3).sum(), [z]).view_as(z),
    "parameters": lambda z: operators.parameter_jacobian(
        lambda p, y: y.sin() @ p["a"], z, parameters={"a": torch.ones(6).double()}
    )["a"],
    "potential": lambda z: divergence(POTENTIAL, 0.5, z)[:, None],
    "its own": lambda z: POTENTIAL.value_and_divergence(torch.tensor(0.5).double(), z).divergence[:, None],
}
POTENTIAL = MLPPotential(6, hidden=(8,), quadratic_rank=2).double()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    operator = OPERATORS[name]
    expected = operator(X)
    slopes = torch.autograd.functional.jacobian(lambda z: operator(z).sum(dim=0), X)
    torch.testing.assert_close(torch.vmap(lambda z: operator(z[None])[0])(X), expected)
    torch.testing.assert_close(jacrev(lambda z: operator(z).sum(dim=0))(X), slopes)
    along = jvp(lambda z: operator(z).sum(dim=0), (X,), (torch.ones_like(X),))[1]
    torch.testing.assert_close(along, slopes.sum(dim=(1, 2)))


FIXED = {
    "steps": {"solver": Solver("rk4", options={"step_size": 0.25})},
    "augmented": {"solver": Solver("rk4", options={"step_size": 0.25}), "likelihood": Augmented()},
    "probes": {"solver": Solver("midpoint"), "estimator": Hutchinson(2)},
}


@pytest.mark.parametrize("name", FIXED)
def test_flows_of_fixed_steps(name):
    flow = ContinuousFlow(NET, 6, **FIXED[name])

    def log_prob(z):
        return flow.log_prob(z, generator=Generator().manual_seed(0))

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_prob(x).sum(), x)
    torch.testing.assert_close(grad(lambda z: log_prob(z).sum())(X), expected)
    torch.testing.assert_close(jacrev(log_prob)(X).sum(dim=0), expected)
    torch.testing.assert_close(jvp(log_prob, (X,), (torch.ones_like(X),))[1], expected.sum(dim=1))


def test_what_is_refused():
    flow = ContinuousFlow(NET, 6)
    adjoint = ContinuousFlow(NET, 6, solver=Solver("rk4", gradient="adjoint"))
    fixed = ContinuousFlow(NET, 6, **FIXED["steps"])
    calls = [
        (lambda: grad(lambda z: flow.log_prob(z).sum())(X), "fixed steps"),
        (lambda: jacrev(flow.log_prob)(X), "fixed steps"),
        (lambda: jvp(flow.decode, (X,), (X,)), "fixed steps"),
        (lambda: grad(lambda z: adjoint.log_prob(z).sum())(X), "torch.autograd.grad"),
        (lambda: torch.vmap(lambda z: flow.log_prob(z[None])[0])(X), "one batch"),
        (lambda: torch.vmap(lambda z: fixed.log_prob(z[None])[0])(X), "one batch"),
        (lambda: torch.vmap(lambda z: fixed.encode(z[None])[0])(X), "one batch"),
        (lambda: torch.vmap(lambda z: z + fixed.sample(1)[0])(X), "at once"),
        (lambda: torch.vmap(lambda z: check_field(NET, 0.5, z[None]) or z)(X), "beforehand"),
        (lambda: grad(lambda z: check_field(NET, 0.5, z) or z.sum())(X), "beforehand"),
        (lambda: torch.func.linearize(lambda z: divergence(NET, 0.5, z), X), "jvp"),
        (lambda: make_fx(lambda z: fixed.log_prob(z))(X), "one batch"),
    ]
    for call, match in calls:
        with pytest.raises(FieldError, match=match):
            call()


@pytest.mark.parametrize("differentiable", [True, False])
def test_forward_mode(differentiable):
    """Dual numbers, of which nothing is lost where no gradient is taken either."""
    flow = ContinuousFlow(NET, 6, **FIXED["steps"])
    along = torch.randn(4, 6, generator=Generator().manual_seed(1), dtype=torch.float64)
    for function in (
        lambda z: divergence(NET, 0.5, z),
        lambda z: divergence(NET, 0.5, z, Autograd()),
        lambda z: operators.laplacian(scalar, z),
        lambda z: operators.gradient(scalar, z).sum(dim=1),
        lambda z: POTENTIAL.value_and_divergence(torch.tensor(0.5).double(), z).divergence,
        flow.log_prob,
    ):
        expected = (operators.gradient(function, X) * along).sum(dim=1)
        with torch.set_grad_enabled(differentiable), forward_ad.dual_level():
            found = forward_ad.unpack_dual(function(forward_ad.make_dual(X, along))).tangent
        torch.testing.assert_close(found, expected)
    with forward_ad.dual_level(), pytest.raises(FieldError, match="fixed steps"):
        ContinuousFlow(NET, 6).log_prob(forward_ad.make_dual(X, along))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tracers():
    found = make_fx(lambda z: divergence(NET, 0.5, z))(2 * X)(X)
    torch.testing.assert_close(found, EXPECTED)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert divergence(NET, 0.5, mode.from_tensor(X)).shape == (4,)
        assert operators.laplacian(scalar, mode.from_tensor(X)).shape == (4,)


OBJECTIVES = {
    "flow matching": ConditionalFlowMatching(),
    "implicit": ImplicitScoreMatching(),
    "sliced": SlicedScoreMatching(2),
    "denoising": DenoisingScoreMatching(0.3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    parameters = dict(NET.named_parameters())

    def loss(p):
        noise = Generator().manual_seed(0)
        return OBJECTIVES[name](lambda t, z: functional_call(NET, p, (t, z)), X, generator=noise).sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for found, true in zip(grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(found, true)


NOISE = Generator()
STEPS = {
    "auto": lambda z: divergence(NET, 0.5, z),
    "probes": lambda z: Hutchinson(2)(NET, 0.5, z, NOISE.manual_seed(0)).divergence,
    "one's own": lambda z: OfOnesOwn().estimate(NET, 0.5, z).divergence,
    "laplacian": lambda z: operators.laplacian(scalar, z),
    "flow": lambda z: ContinuousFlow.log_prob(FLOW, z),
    **{
        f"also {name}": lambda z, e=e: e(NET, 0.5, z, NOISE.manual_seed(0)).divergence
        for name, e in (EXACT | STOCHASTIC).items()
        if name != "colored"
    },
    **{f"also {name}": lambda z, f=f: f(z).sum(dim=1) for name, f in OPERATORS.items() if name != "parameters"},
    "also value": lambda z: value_and_divergence(NET, 0.5, z).value.sum(dim=1),
    "also explained": lambda z: z * Exact().explain(NET, 0.5, z).cost_in_forward_passes,
    "also checked": lambda z: check_field(NET, 0.5, z) or z,
    "also samples": lambda z: FLOW.decode(z),
    "also evaluated": lambda z: FLOW.evaluate(z).log_prob,
    "also adjoint": lambda z: ContinuousFlow(NET, 6, solver=Solver(gradient="adjoint")).log_prob(z),
    "also implicit": lambda z: ImplicitScoreMatching()(NET, z),
    "also matching": lambda z: ConditionalFlowMatching()(NET, z, generator=NOISE.manual_seed(0)),
}
FLOW = ContinuousFlow(NET, 6)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("also") else ()) for n in STEPS]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_steps(name):
    def step(z):
        return (STEPS[name](2 * z + 1) * 3).sum() + z.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        expected, found = step(x), compiled(y)
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        torch.testing.assert_close(y.grad, x.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), step(X))


def test_a_graph_that_may_not_be_broken():
    torch.compiler.reset()  # what other tests compiled
    compiled = torch.compile(lambda z: divergence(NET, 0.5, z), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="divflow follows a field|Skip|disable"):
        compiled(X)


def test_no_trace_is_left():
    """What was known before is known afterwards, and an error inside leaves no transform behind."""
    with contextlib.suppress(FieldError):
        torch.vmap(lambda z: divergence(NET, 0.5, z[None], Hutchinson())[0])(X)
    torch.testing.assert_close(divergence(NET, 0.5, X), EXPECTED)
    assert Exact().explain(NET, 0.5, X).method == "layered"

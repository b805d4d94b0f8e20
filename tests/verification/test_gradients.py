"""Gradients of fields and of their divergences, compared with central differences before the first training step."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from divflow.divergence import (
    Autograd,
    ControlVariate,
    Exact,
    FieldError,
    FieldWarning,
    Hutchinson,
    HutchPlusPlus,
    XTrace,
    check_field,
    divergence,
    severed_fields,
)
from divflow.flow import ContinuousFlow
from divflow.networks import MLP, Potential
from divflow.score.objectives import ImplicitScoreMatching
from divflow.tasks import FlowMatchingTask, FlowTask, ScoreTask
from divflow.verification.gradients import check_gradient


class Kept(torch.autograd.Function):
    """exp, whose backward pass multiplies by a value that it kept without its graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.value = x.exp()
        return ctx.value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value


class Saved(torch.autograd.Function):
    """exp, as it should be."""

    @staticmethod
    def forward(ctx, x):
        value = x.exp()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class WrongInTheWeight(torch.autograd.Function):
    """w * x, whose derivative in w is twice what it should be."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, 2 * (gradient * x).sum(0)


class Net(nn.Module):
    def __init__(self, activation, size=4, hidden=12):
        super().__init__()
        self.first, self.last = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.activation = activation

    def forward(self, t, x):
        return self.last(self.activation(self.first(x)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, t, x):
        return WrongInTheWeight.apply(x, self.weight).sin()


def net(function=Kept):
    torch.manual_seed(0)
    return Net(lambda h: function.apply(0.3 * h))


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
ESTIMATORS = [
    Exact(),
    Exact("reverse"),
    Autograd(),
    Hutchinson(),
    XTrace(4),
    HutchPlusPlus(4),
    ControlVariate(Hutchinson(), references=4),
    Hutchinson().freeze(X),
]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, None], ids=lambda it: type(it).__name__)
def test_a_function_that_keeps_an_intermediate_is_refused(estimator):
    field = net()
    check_field(field, 0.3, X)  # its divergence is right
    torch.testing.assert_close(divergence(field, 0.3, X), divergence(net(Saved), 0.3, X), rtol=1e-4, atol=1e-5)
    with pytest.raises(FieldError, match="gradient of its divergence is wrong.* by central differences.*It calls Kept"):
        check_field(field, 0.3, X, gradient=True, estimator=estimator)
    check_field(net(Saved), 0.3, X, gradient=True, estimator=estimator)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_conditional_fields(count):
    """Bound to a context of a row a sample, whether the field says which rows are whose, or a function holds them."""
    context = torch.randn(count, 4)
    for function, right in ((Saved, True), (Kept, False)):
        velocity = lambda t, x, c, function=function: function.apply(0.3 * x * c)  # noqa: E731
        flow = ContinuousFlow(velocity, 4)
        for field in (flow.field(context), lambda t, x, v=velocity: v(t, x, context)):
            if right:
                check_field(field, 0.0, X[:count], gradient=True)
            else:
                with severed_fields("refuse"), pytest.raises(FieldError, match="gradient of its divergence is wrong"):
                    check_gradient(field, 0.0, X[:count], Exact())


def test_both_numbers_are_reported():
    """exp(x) has the divergence sum exp(x), which is its own derivative along x; autograd finds none."""
    with pytest.raises(FieldError, match=r"is -?\d.*e?.* by central differences, and 0 by autograd"):
        check_field(lambda t, x: Kept.apply(x), 0.0, X, gradient=True)


def test_a_wrong_derivative_in_a_parameter_is_refused():
    with pytest.raises(FieldError, match="gradient of the field's value is wrong"):
        check_field(Scaled(), 0.0, X, gradient=True)


def test_a_field_that_means_it_is_not_compared():
    check_field(net(), 0.3, X, gradient=True, detached=True)
    with severed_fields("allow"):
        check_gradient(net(), 0.3, X, Exact())


def test_in_a_bare_call_it_is_a_warning():
    with pytest.warns(FieldWarning, match="gradient of its divergence is wrong"):
        check_gradient(net(), 0.3, X, Exact())


class InFloat32(nn.Module):
    """One that computes in float32 whatever it is given, where differences tell little."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t, x):
        return self.function.apply(x.float())


def test_in_float32_it_is_a_warning():
    with pytest.warns(FieldWarning, match="gradient of its divergence is wrong"):
        check_field(InFloat32(Kept), 0.0, X, gradient=True)
    check_field(InFloat32(Saved), 0.0, X, gradient=True)


def task_of(kind, field):
    if kind == "score":
        return ScoreTask(field, ImplicitScoreMatching())
    return {"flow": FlowTask, "flow matching": FlowMatchingTask}[kind](ContinuousFlow(field, 4))


@pytest.mark.parametrize("kind", ["flow", "flow matching", "score"])
def test_no_task_begins_with_it(kind):
    task_of(kind, net(Saved)).check(X)
    with pytest.raises(FieldError, match="gradient of its divergence is wrong"):
        task_of(kind, net()).check(X)


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.GRUCell(4, 4), None

    def forward(self, t, x):
        self.state = self.cell(x, self.state if self.state is not None and len(self.state) == len(x) else None)
        return self.state


class Neighbours(nn.Module):
    """Edges to the nearest two of five points in the plane, which are chosen without a graph."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, t, x):
        points = x.view(len(x), -1, 2)
        with torch.no_grad():
            chosen = torch.cdist(points, points).topk(2, largest=False)[1]
        others = torch.gather(
            points.unsqueeze(1).expand(-1, points.shape[1], -1, -1), 2, chosen.unsqueeze(-1).expand(-1, -1, -1, 2)
        )
        difference = others - points.unsqueeze(2)
        return (difference * self.net(difference.square().sum(-1, keepdim=True))).sum(2).reshape(x.shape)


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, t, x):
        return self.net(x).squeeze(1)


def zeroed(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


RIGHT = {
    "ReLU": lambda: Net(nn.ReLU()),
    "ReLU, steep": lambda: Net(lambda h: torch.relu(100 * h)),
    "a stairway of kinks": lambda: Net(lambda h: sum(torch.relu(h - i / 50) for i in range(-50, 50))),
    "Hardtanh": lambda: Net(nn.Hardtanh(-0.1, 0.1)),
    "rounded": lambda: lambda t, x: x * (1 + 0 * x.round()),
    "dropout": lambda: Net(nn.Dropout(0.5)),
    "layer normalization": lambda: Net(nn.LayerNorm(12)),
    "spectral normalization": lambda: Net(nn.Tanh()).apply(
        lambda m: spectral_norm(m) if isinstance(m, nn.Linear) else m
    ),
    "a state": Memory,
    "all zero": lambda: zeroed(Net(nn.ReLU())),
    "steep": lambda: Net(lambda h: torch.tanh(1e3 * h)),
    "own divergence": lambda: Potential(Bowl()),
    "of no derivative": lambda: lambda t, x: torch.zeros_like(x),
    "once differentiable": lambda: lambda t, x: nn.functional.hardsigmoid(x),
    "captured tensors": lambda: (lambda w: lambda t, x: (x @ w).sin())(torch.randn(4, 4, requires_grad=True)),
    "a bound method": lambda: Net(nn.SiLU()).forward,
    "conditional": lambda: ContinuousFlow(MLP(4, context_features=2), 4).field(torch.randn(6, 2)),
}


@pytest.mark.filterwarnings("ignore:.*changes its own state")
@pytest.mark.parametrize("name", RIGHT)
def test_right_fields_are_neither_refused_nor_warned_of(name):
    torch.manual_seed(0)
    for x in (X, torch.zeros_like(X), 1e3 * X):
        field = RIGHT[name]()
        with severed_fields("refuse"), warnings.catch_warnings():
            warnings.simplefilter("error", FieldWarning)
            for t in (0.3, torch.rand(6)):
                check_gradient(field, t, x, Exact())


def test_points_that_choose_their_neighbours():
    with severed_fields("refuse"), warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gradient(Neighbours(), 0.3, torch.randn(4, 10), Exact())


def test_nothing_of_the_callers_is_changed():
    weight = torch.randn(4, 4, requires_grad=True)
    field, x = net(Saved), X.clone()
    tensors = [x, weight, *field.parameters()]
    before, state = [z.detach().clone() for z in tensors], torch.get_rng_state()
    for g in (field, lambda t, z: (z @ weight).sin(), field.forward):
        check_gradient(g, 0.3, x, Exact())
    for z, own in zip(tensors, before, strict=True):
        assert torch.equal(z.detach(), own)
        assert z.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.requires_grad


def generated(seed):
    """A network of random depth, width, activations and normalizations, at random states."""
    noise = torch.Generator().manual_seed(seed)

    def choose(things):
        return things[int(torch.randint(len(things), (), generator=noise))]

    torch.manual_seed(seed)
    size, layers = choose([1, 2, 3, 6, 10, 40, 100, 784]), []
    width = size
    for _ in range(choose([1, 2, 3])):
        hidden = choose([8, 32, 64])
        kinds = [
            nn.ReLU,
            nn.SiLU,
            nn.LeakyReLU,
            nn.GELU,
            nn.ELU,
            nn.Hardtanh,
            nn.Hardswish,
            nn.Tanh,
            nn.Softplus,
            nn.Hardshrink,
        ]
        layers += [
            nn.Linear(width, hidden),
            choose([*kinds, nn.Softshrink, nn.Mish, nn.PReLU, lambda: nn.Dropout(0.3)])(),
        ]
        layers += choose([[], [], [nn.LayerNorm(hidden)], [nn.GroupNorm(2, hidden)], [nn.RMSNorm(hidden)]])
        width = hidden
    network, scale = nn.Sequential(*layers, nn.Linear(width, size)), choose([0.1, 1.0, 1.0, 10.0, 100.0])
    x = torch.randn(3, size, generator=noise) * choose([1e-2, 1.0, 1.0, 1e2])
    x = choose([x, x, x.relu(), torch.zeros_like(x)])
    estimator = choose([Hutchinson(), Hutchinson(2), Exact() if size <= 40 else Hutchinson()])
    return lambda t, z: network(scale * z), x, estimator


def false_alarms(seeds):
    alarms = []
    for seed in seeds:
        field, x, estimator = generated(seed)
        with severed_fields("refuse"), warnings.catch_warnings():
            warnings.simplefilter("error", FieldWarning)
            try:
                check_gradient(field, 0.3, x, estimator)
            except (FieldError, FieldWarning) as error:
                alarms.append((seed, str(error)))
    return alarms


def test_generated_fields():
    assert false_alarms(range(20)) == []


@pytest.mark.slow
def test_many_generated_fields():
    assert false_alarms(range(1000)) == []

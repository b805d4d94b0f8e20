"""Derivatives of normalizations above the second, which torch has wrong (2.13), against central differences."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from divflow.divergence import Autograd, Exact, Hutchinson, divergence, value_and_divergence
from divflow.networks import Potential
from divflow.operators import gradient, hessian, laplacian
from divflow.operators.linearization import linearize

W, B, EVENT = torch.tensor([1.5, -0.5, 0.7, 2.0]).double(), torch.tensor([0.2, 0.0, -1.0, 0.5]).double(), (4, 2, 2)


def channels_last(norm):
    return lambda z, w, b: norm(z.movedim(1, 3), w, b).movedim(3, 1)


NORMS = {
    "layer_norm": channels_last(lambda z, w, b: F.layer_norm(z, (4,), w, b)),
    "layer_norm over all": lambda z, w, b: F.layer_norm(z * w.view(4, 1, 1), EVENT),
    "torch.layer_norm": channels_last(lambda z, w, b: torch.layer_norm(z, (4,), w, b, 0.1)),
    "torch.native_layer_norm": channels_last(lambda z, w, b: torch.native_layer_norm(z, (4,), w, None, 0.1)[0]),
    "torch.ops.aten.layer_norm": channels_last(lambda z, w, b: torch.ops.aten.layer_norm.default(z, (4,), w, b)),
    "torch.ops.aten.native_layer_norm": channels_last(
        lambda z, w, b: torch.ops.aten.native_layer_norm(z, (4,), w, b, 0.1)[0]
    ),
    "instance_norm": lambda z, w, b: F.instance_norm(z, weight=w, bias=b),
    "torch.instance_norm": lambda z, w, b: torch.instance_norm(z, w, b, None, None, True, 0.1, 0.1, False),
    "batch_norm, in training": lambda z, w, b: F.batch_norm(z, None, None, w, b, training=True),
    "batch_norm, evaluation": lambda z, w, b: F.batch_norm(z, 0.1 * B, W**2, w, b),
    "native_batch_norm": lambda z, w, b: torch.native_batch_norm(z, w, b, None, None, True, 0.1, 1e-5)[0],
    "_batch_norm_with_update": lambda z, w, b: torch.ops.aten._batch_norm_with_update(
        z, w, b, torch.zeros(4).double(), torch.ones(4).double(), 0.1, 1e-5
    )[0],
    "group_norm": lambda z, w, b: F.group_norm(z, 2, w, b),
    "native_group_norm": lambda z, w, b: torch.native_group_norm(z, w, b, len(z), 4, 4, 2, 1e-5)[0],
    "rms_norm": lambda z, w, b: F.rms_norm(z * w.view(4, 1, 1), (2, 2)),
    "scripted": torch.jit.script(nn.LayerNorm(EVENT).double()),
}


def of_state(name):
    """The normalization as a function of one tensor: of its input, its weight and its bias."""

    def function(state):
        z, w, b = state[0].split([2 * 16, 4, 4])
        arguments = (z.view(2, *EVENT),) if name == "scripted" else (z.view(2, *EVENT), w + W, b + B)
        return NORMS[name](*arguments).reshape(1, -1)

    return function


def products(function, order, batched):
    """The gradient of u^T f, of u^T times that, and so on, for a random vector u at each order."""

    def gradient_of(f):
        def derivative(state):
            at = linearize(f, state, lambda value, _: value)
            noise = torch.Generator().manual_seed(0)
            vectors = torch.randn((3, *at.value.shape), generator=noise, dtype=torch.float64)
            return at.pullback(vectors)[1] if batched else at.pullback(vectors[1:2])[0]

        return derivative

    for _ in range(order):
        function = gradient_of(function)
    return function


@pytest.mark.parametrize("batched", [False, True], ids=["one product", "several"])
@pytest.mark.parametrize("name", NORMS)
def test_of_any_order_under_any_name(name, batched):
    noise = torch.Generator().manual_seed(1)
    state, direction = (torch.randn((1, 40), generator=noise, dtype=torch.float64) for _ in range(2))
    for order in (1, 2, 3, 4):
        lower, h = products(of_state(name), order - 1, batched), 1e-5
        found = (products(of_state(name), order, batched)(state) * direction).sum()
        noise = torch.Generator().manual_seed(0)
        weights = torch.randn((3, *lower(state).shape), generator=noise, dtype=torch.float64)[1]
        difference = ((lower(state + h * direction) - lower(state - h * direction)) * weights).sum() / (2 * h)
        torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_the_value_and_its_product_are_torchs_own(name):
    z = torch.randn(2, *EVENT, dtype=torch.float64)
    norm = (lambda t, x: NORMS[name](x)) if name == "scripted" else lambda t, x: NORMS[name](x, W, B)
    point, vector = z.clone().requires_grad_(), torch.randn(2, *EVENT, dtype=torch.float64)
    (product,) = torch.autograd.grad(norm(0.0, point), point, vector, create_graph=True)
    at = linearize(lambda x: norm(0.0, x), z.clone().requires_grad_(), lambda value, _: value)
    assert torch.equal(at.value, norm(0.0, z))
    assert torch.equal(at.pullback(vector[None])[0], product)


def network(norm=lambda: nn.LayerNorm(7), last=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 7), norm(), nn.Tanh(), nn.Linear(7, 7), norm(), nn.Tanh(), nn.Linear(7, last)
    ).double()


def third(scalar, x, parameters):
    """The gradient of |gradient|^2 of a scalar function of the state in all that it depends on, and by differences."""

    def slope(x):
        (gradient,) = torch.autograd.grad(scalar(x), x, create_graph=True)
        return gradient.square().sum()

    point, noise = x.clone().requires_grad_(), torch.Generator().manual_seed(2)
    inputs = [point, *parameters]
    directions = [torch.randn(z.shape, generator=noise, dtype=torch.float64) for z in inputs]
    gradients = torch.autograd.grad(slope(point), inputs, materialize_grads=True)
    values = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            for z, direction in zip(inputs, directions, strict=True):
                z += h * direction
        values.append(slope(point).detach())
        with torch.no_grad():
            for z, direction in zip(inputs, directions, strict=True):
                z -= h * direction
    found = sum((g * direction).sum() for g, direction in zip(gradients, directions, strict=True))
    torch.testing.assert_close(found, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)


ESTIMATORS = {
    "exact": Exact(),
    "reverse": Exact("reverse"),
    "reverse, one by one": Exact("reverse", 1),
    "reverse, computed again": Exact("reverse", 2),
    "forward": Exact("forward"),
    "the loop": Autograd(),
    "probes": Hutchinson(2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_a_divergence_is_differentiated(name):
    net, x = network(), torch.randn(3, 4, dtype=torch.float64)
    estimator = ESTIMATORS[name].freeze(x, torch.Generator().manual_seed(0))
    for _ in range(3):  # verified at the first two calls
        third(lambda z: divergence(lambda t, y: net(y), 0.0, z, estimator).square().sum(), x, list(net.parameters()))


@pytest.mark.parametrize("name", ["reverse", "probes", "the loop"])
def test_fourth_derivatives_that_the_user_takes(name):
    """Beyond the products, autograd goes through the evaluation itself once more."""
    net, x = network(), torch.randn(3, 4, dtype=torch.float64)
    estimator = ESTIMATORS[name].freeze(x, torch.Generator().manual_seed(0))

    def slope(z):
        (gradient,) = torch.autograd.grad(
            divergence(lambda t, y: net(y), 0.0, z, estimator).square().sum(), z, create_graph=True
        )
        return gradient.square().sum()

    third(slope, x, [])


def energy_score(net):
    """A score that differentiates its energy by itself."""

    def score(t, x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            return -torch.autograd.grad(net(z).square().sum(), z, create_graph=True)[0]

    return score


@pytest.mark.parametrize("name", ["exact", "reverse", "the loop", "probes"])
def test_the_training_gradient_of_the_score_of_an_energy(name):
    net, x = network(last=1), torch.randn(3, 4, dtype=torch.float64)
    estimator = ESTIMATORS[name].freeze(x, torch.Generator().manual_seed(0))
    parameters, noise = list(net.parameters()), torch.Generator().manual_seed(3)

    def loss():
        value, div = value_and_divergence(energy_score(net), 0.0, x, estimator)
        return (value.square().sum(1) / 2 + div).sum()  # Hyvarinen's

    directions = [torch.randn(z.shape, generator=noise, dtype=torch.float64) for z in parameters]
    gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    found = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for z, d in zip(parameters, directions, strict=True):
                z += step * d
        values.append(loss().detach())
    torch.testing.assert_close(found, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(7), lambda: nn.GroupNorm(7, 7, eps=1.0)], ids=["layer", "group"])
def test_a_potential_with_normalizations_is_trained(norm):
    class Phi(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(norm, last=1)

        def forward(self, t, x):
            return self.net(x).squeeze(1)

    field, x = Potential(Phi()), torch.randn(3, 4, dtype=torch.float64)
    for _ in range(3):  # compared with autograd at the first two calls, gradients and all
        third(lambda z: divergence(field, 0.3, z).sum(), x, [])
    results = [value_and_divergence(field, torch.tensor(0.3).double(), x, way) for way in (Exact(), Autograd())]
    gradients = [
        torch.autograd.grad(result.divergence.sum(), list(field.parameters()), materialize_grads=True)
        for result in results
    ]
    torch.testing.assert_close(*gradients)


def test_operators():
    net, x = network(last=1), torch.randn(2, 4, dtype=torch.float64)

    def f(z):
        return net(z).squeeze(1)

    def trace(z):
        return hessian(f, z).diagonal(dim1=1, dim2=2).sum(1)

    h, direction = 1e-5, torch.randn(2, 4, dtype=torch.float64)
    for function in (trace, lambda z: laplacian(f, z), lambda z: laplacian(f, z, Exact("reverse"))):
        found = (gradient(function, x) * direction).sum(1)
        difference = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        torch.testing.assert_close(found, difference, rtol=1e-6, atol=1e-8)


def test_within_a_checkpoint_of_the_users():
    net, x = network(), torch.randn(3, 4, dtype=torch.float64)

    def field(t, z):
        return checkpoint(net, z, use_reentrant=False)

    third(lambda z: divergence(field, 0.0, z, Hutchinson().freeze(z, torch.Generator().manual_seed(0))).sum(), x, [])


def test_low_precision_is_carried_in_a_higher_one():
    net, x = network().bfloat16(), torch.randn(3, 4).bfloat16()
    true, point = network(), x.double().requires_grad_()
    true.load_state_dict(net.state_dict())
    results = []
    for module, z in ((net, x.clone().requires_grad_()), (true, point)):
        div = divergence(lambda t, y, module=module: module(y), 0.0, z, Exact("reverse"))
        (first,) = torch.autograd.grad(div.sum(), z, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), z)[0].double())
    assert (results[0] - results[1]).norm() < 0.1 * results[1].norm()


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def test_nothing_keeps_the_graph_alive():
    """No cycle leads through the hooks: what was saved goes when the results go, without the garbage collector."""
    net, x, held = network(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True), []

    def pack(tensor):
        holder = Held(tensor)
        held.append(weakref.ref(holder))
        return holder

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            div = divergence(lambda t, y: net(y), 0.0, x, Autograd())
            (first,) = torch.autograd.grad(div.sum(), x, create_graph=True)
            torch.autograd.grad(first.square().sum(), x)
        assert sum(reference() is not None for reference in held) > 10
        del div, first
        assert not any(reference() is not None for reference in held)
    finally:
        gc.enable()

"""The layered method against the loop over dimensions: values, first and second derivatives, on every kind of network."""

import itertools

import pytest
import torch
from catalogue import true_jacobian
from layered_networks import ACTIVATIONS, NETWORKS, D, Plain
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, divergence
from divflow.divergence.layered import contract, follow
from divflow.divergence.layered.choose import choose
from divflow.divergence.layered.cuts import Network
from divflow.divergence.layered.paths import bases_of
from divflow.verification import severed_fields

LAYERED = Exact("layered")


@pytest.fixture(autouse=True)
def _derivatives_are_those_of_autograd():
    """Whatever is detached, or has a backward pass that is another function's: the methods are compared with one another."""
    with severed_fields("allow"):
        yield


TIMES = {"scalar t": lambda k: torch.tensor(0.3), "t per sample": lambda k: torch.linspace(0.1, 0.9, k)}


def make(name, dtype):
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype), torch.randn(4, D, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_divergence(name, time, dtype, tolerance):
    field, x = make(name, dtype)
    t = TIMES[time](len(x)).to(dtype)
    jacobian = true_jacobian(field, t, x)
    diagonal = jacobian.diagonal(dim1=1, dim2=2)
    scale = diagonal.abs().sum(dim=1).max().item()
    for _ in range(2):  # the second call finds its plan made
        value, div = LAYERED(field, t, x)
        torch.testing.assert_close(value, field(t, x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(div, diagonal.sum(dim=1), rtol=tolerance, atol=tolerance * scale)
        with torch.no_grad():
            quiet = LAYERED(field, t, x)
        torch.testing.assert_close(quiet.divergence, div.detach(), rtol=tolerance, atol=tolerance * scale)
        assert not quiet.value.requires_grad
        assert not quiet.divergence.requires_grad


@pytest.mark.parametrize("time", TIMES)
# torch has no second derivative of hardsigmoid.
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"hardsigmoid"}))
def test_first_and_second_derivatives(name, time):
    field, x = make(name, torch.float64)
    t = TIMES[time](len(x)).double().requires_grad_()
    x.requires_grad_()
    parameters = [parameter for parameter in field.parameters() if parameter.requires_grad]
    weights = torch.randn(len(x), dtype=torch.float64)
    results = []
    for estimator in (Autograd(), LAYERED):
        value, div = estimator(field, t, x)
        objective = (weights * div).sum() + (value**2).sum()
        first = torch.autograd.grad(objective, [x, t, *parameters], create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum((gradient**2).sum() for gradient in first), [x, t, *parameters], materialize_grads=True
        )
        results.append((first, second))
    for expected, actual in zip(*results, strict=True):
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * (1 + a.abs().max().item()))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functional_and_method_form(name):
    """As F.name(x), torch.name(x) or x.name(), wherever torch has them."""
    base = name.replace(" ", "_")
    forms = [getattr(namespace, base, None) for namespace in (nn.functional, torch, torch.special)]
    forms += [lambda x: getattr(x, base)()] if hasattr(torch.Tensor, base) and base != "prelu" else []
    x = torch.randn(3, 4, dtype=torch.float64)
    for form in filter(callable, forms):
        if base in ("prelu", "threshold"):
            continue
        torch.testing.assert_close(
            divergence(lambda t, x, f=form: f(2 * x), 0.0, x, LAYERED),
            divergence(lambda t, x, f=form: f(2 * x), 0.0, x, Autograd()),
        )


def test_arithmetic_in_every_form():
    c = torch.rand(4, dtype=torch.float64) + 1
    per_sample = torch.rand(3, 1, dtype=torch.float64) + 1

    def field(t, x):
        y = 2 * x + x / c - (1 - x) * c + c / (x * x + 2) - 3 / (x**2 + 1) + 2**x - (-x) + +x
        y = y.add(x, alpha=3).sub(x * c, alpha=2).mul(per_sample).div(x.exp() + 1) + x.pow(3) + torch.rsub(x, 1)
        y = torch.addcmul(y, x, x.sin(), value=0.5) + torch.lerp(x, y, 0.3) + torch.clamp(x, -0.5, 0.5)
        return y + torch.maximum(x, y) + torch.atan2(x, c) + (x * x.detach()) + x.square() + torch.hypot(x, x)

    x = torch.rand(3, 4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(divergence(field, 0.0, x, LAYERED), divergence(field, 0.0, x, Autograd()))


def test_one_mask_of_dropout():
    layers = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Tanh(), nn.Linear(50, 5)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    results = []
    for estimator in (LAYERED, LAYERED, Autograd()):
        torch.manual_seed(3)
        results.append(estimator(lambda t, x: layers(x), 0.0, x))
    for result in results[:2]:
        torch.testing.assert_close(result.value, results[2].value)
        torch.testing.assert_close(result.divergence, results[2].divergence)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return -5 * gradient


W = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6).sin()


def _running_statistics():
    norm = nn.InstanceNorm1d(2, track_running_stats=True).double()
    return lambda x: norm(x.view(-1, 2, 3)).flatten(1)


NOT_LAYERED = {
    "softmax to another precision": (lambda: lambda x: x @ W + x.softmax(1, dtype=torch.float64), "to another dtype"),
    "running statistics": (_running_statistics, "keeps running statistics"),
    "custom function": (lambda: Reversed.apply, "hidden from torch functions"),
    "custom function inside": (lambda: lambda x: x.sin() * 2 + Reversed.apply(x.cos()), "hidden from torch functions"),
    "a sample": (lambda: lambda x: x + 0 * x[0], "getitem over the batch"),
    "written into a buffer": (lambda: lambda x: torch.zeros_like(x).index_copy_(1, torch.arange(6), x), "index_copy_"),
    "changed through a view": (lambda: _through_a_view, "through another view"),
    "the largest entry": (lambda: lambda x: x @ W * x.max(dim=1).values[:, None], "max has no rule"),
    "sorted": (lambda: lambda x: x.sort(dim=1).values, "sort has no rule"),
    "gathered": (lambda: lambda x: x.gather(1, x.argsort(dim=1)), "gather between samples"),
    "scripted": (lambda: torch.jit.script(_scripted), "hidden from torch functions"),
    "a gradient": (lambda: _gradient, "has no rule"),
}


def _through_a_view(x):
    y = x * 2
    y[:, :3].mul_(x[:, :3])
    return y.sin()


def _scripted(x):
    return x * x


def _gradient(x):
    z = x.detach().requires_grad_() if not x.requires_grad else x
    return torch.autograd.grad((z**4).sum(), z, create_graph=True)[0]


@pytest.mark.parametrize("name", NOT_LAYERED)
def test_what_has_no_rule_is_exact_all_the_same(name):
    torch.manual_seed(0)
    make_function, reason = NOT_LAYERED[name]
    function = make_function()
    function = function.double() if isinstance(function, nn.Module) and name != "scripted" else function
    x = torch.randn(5, 6, dtype=torch.float64)

    def field(t, x):
        return function(x)

    plan = Exact().explain(field, 0.0, x)
    assert plan.method != "layered"
    assert plan.method == "colored" or reason in plan.why
    for _ in range(2):
        torch.testing.assert_close(
            divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()), rtol=1e-10, atol=1e-10
        )
    with pytest.raises(FieldError, match=reason):
        divergence(field, 0.0, x, LAYERED)


MIXING = {
    "a norm of everything": lambda t, x: x @ W * x.norm(),
    "a variance of samples": lambda t, x: x @ W / x.var(0),
    "a product over samples": lambda t, x: x @ x.T @ x,
    "an outer product": lambda t, x: (x[:, :, None] * x[:, None, :]) @ x[0],
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_is_refused(name):
    with pytest.raises(FieldError, match="mixes the samples"):
        divergence(MIXING[name], 0.0, torch.randn(5, 6, dtype=torch.float64))


def test_batch_of_as_many_samples_as_dimensions():
    """Where k = n, a constant a sample and a matrix can't be told by their shapes."""
    scales = torch.rand(6, 6, dtype=torch.float64)
    field = nn.Linear(6, 6, dtype=torch.float64)
    x = torch.randn(6, 6, dtype=torch.float64)

    def scaled(t, x):
        return torch.tanh(field(x) * scales) @ scales

    torch.testing.assert_close(divergence(scaled, 0.0, x), divergence(scaled, 0.0, x, Autograd()))

    def mixed(t, x):  # a matrix for each sample: no linear map that the batch shares
        return torch.einsum("bij,bj->bi", scales.expand(6, 6, 6) * torch.arange(6).view(6, 1, 1), x)

    torch.testing.assert_close(divergence(mixed, 0.0, x), divergence(mixed, 0.0, x, Autograd()))


def test_a_last_layer_of_zeros_hides_nothing():
    """Verified while its weights are zero, a network is followed as well when they no longer are."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
            nn.init.zeros_(self.last.weight)

        def forward(self, t, x):
            return self.last(Reversed.apply(self.first(x)))

    field, x = Network(), torch.randn(3, 6, dtype=torch.float64)
    assert divergence(field, 0.0, x).abs().max() == 0
    nn.init.normal_(field.last.weight)
    torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))


def test_a_changed_structure_is_noticed():
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.linear = False, nn.Linear(6, 6).double()

        def forward(self, t, x):
            h = self.linear(x)
            return (Reversed.apply(h.sin()) if self.hidden else h.sin()) * 1

    field, x = Switching(), torch.randn(3, 6, dtype=torch.float64)
    for hidden in (False, True, False):
        field.hidden = hidden
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                torch.testing.assert_close(
                    divergence(field, 0.0, x).detach(), divergence(field, 0.0, x, Autograd()).detach()
                )


def test_new_layers_of_one_module_are_noticed():
    field = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    x = torch.randn(3, 6, dtype=torch.float64)

    def g(t, x):
        return field(x)

    for layer in (nn.Tanh(), nn.LayerNorm(8).double(), nn.Softmax(1), nn.ReLU()):
        field[1] = layer
        torch.testing.assert_close(divergence(g, 0.0, x), divergence(g, 0.0, x, Autograd()))


def test_it_is_taken_where_it_is_cheaper():
    x = torch.randn(4, D)
    assert Exact().explain(NETWORKS["tanh"](), 0.0, x).method == "layered"
    deep = Exact().explain(NETWORKS["deep residual"](), 0.0, torch.randn(64, D))
    assert deep.method == "reverse"
    assert "paths" in deep.why
    gated = NETWORKS["divflow ConcatSquash"]()
    shared = Exact().explain(gated, torch.tensor(0.1), x)
    own = Exact().explain(gated, torch.rand(4), x)
    assert shared.cost_in_forward_passes < own.cost_in_forward_passes  # gates that the batch shares are folded in


def test_cost_does_not_grow_with_the_dimension():
    costs = []
    for size in (16, 64, 256):
        net = nn.Sequential(nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, size))
        plan = Exact().explain(lambda t, x, net=net: net(x), 0.0, torch.randn(512, size))
        assert plan.method == "layered"
        costs.append(plan.cost_in_forward_passes)
    assert costs == sorted(costs, reverse=True)
    assert max(costs) < 2


@pytest.mark.parametrize("name", ["two layer norms", "instance norm"])
def test_second_derivatives_that_torch_has_wrong(name):
    """Torch takes the statistics of its own kernels for constants in third derivatives (2.13); ours are right."""
    field, x = make(name, torch.float64)
    direction, step = torch.randn_like(x), 1e-5

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(divergence(field, 0.3, x, LAYERED).sum(), x, create_graph=True)[0], x

    slope, point = gradient(x)
    (second,) = torch.autograd.grad((slope * direction).sum(), point)
    differences = (gradient(x + step * direction)[0] - gradient(x - step * direction)[0]) / (2 * step)
    torch.testing.assert_close(second, differences.detach(), rtol=1e-5, atol=1e-7 * differences.abs().max().item())


def layer_normalized(size, hidden):
    layers = [nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)]
    return Plain(*layers, nn.Tanh(), nn.Linear(hidden, size))


def test_normalization_costs_vectors():
    """Each statistic is a row for the batch around the cycle, whatever D is: no matrix a sample."""
    for size in (43, 256):
        plan = Exact().explain(layer_normalized(size, 256), 0.0, torch.randn(256, size))
        assert plan.method == "layered"
        assert "2 rows carried through 2 of its places" in plan.why
        assert plan.cost_in_forward_passes < 4
        assert plan.memory < 32 * 256 * 256 * 4
    for norm in (nn.LayerNorm(64), nn.Softmax(dim=1), nn.RMSNorm(64)):
        net = Plain(nn.Linear(784, 64), norm, nn.Linear(64, 784))
        assert Exact().explain(net, 0.0, torch.randn(32, 784)).cost_in_forward_passes < 2.5


@pytest.mark.parametrize(
    "name",
    ["two layer norms", "layer norm before blocks", "four hidden layers", "residual", "glu", "softmax and layer norm"],
)
def test_the_trace_is_the_same_wherever_paths_are_cut(name):
    """The paths through a place and those past it are all of them: no cut changes their sum, in bundles or not."""
    field, x = make(name, torch.float64)
    expected = divergence(field, 0.3, x, Autograd()).detach()
    with torch.no_grad():
        followed = follow(field, torch.tensor(0.3, dtype=torch.float64), x, products=False)
        terms = followed.trace.terms(followed.output)
        bases = bases_of(terms)
        cuts = [(*rest, bases[-1]) for r in range(3) for rest in itertools.combinations(bases[:-1], r)]
        networks = [Network(terms, bases, frozenset(map(id, cut))) for cut in [*cuts, bases]]
        for network in [*networks, choose(terms, len(x))]:
            for chunk_size in (None, 2):
                result = followed.divergence(contract.contraction(network, D), chunk_size)
                torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_verified_call_gives_the_same_bits(name, grad):
    """Calls 1, 2 and 4 are verified, 3 and 5 are not; a run that is resumed counts anew, and must end with the same."""
    field, x = make(name, torch.float32)
    field.requires_grad_(grad is torch.enable_grad)
    with grad():
        results = [divergence(field, 0.3, x, LAYERED).detach() for _ in range(5)]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_what_was_chosen_for_one_network_is_not_taken_for_another_that_does_the_same_operations():
    """The same operations on tensors of the same shapes, applied side by side, or one after another: one path more than there is a form for."""
    first, second = (torch.randn(32, 32, dtype=torch.float64) / 6 for _ in range(2))
    x = torch.randn(512, 32, dtype=torch.float64)

    def deep(t, x):
        for _ in range(3):
            x = (x @ first).tanh()
        return x @ second + x

    def wide(t, x):
        a = (x @ first).tanh()
        b, c = (a @ first).tanh(), (x @ second).tanh()
        return b @ second + c

    for field, is_cut in ((wide, False), (deep, True)):
        assert ("carried through" in LAYERED.explain(field, 0.0, x).why) == is_cut
        torch.testing.assert_close(LAYERED(field, 0.0, x).divergence, Autograd()(field, 0.0, x).divergence)


def test_numbers_of_each_sample_cost_nothing():
    """They commute with every matrix, so that times of their own leave a score or a denoiser its closed form."""
    field, x = make("preconditioned", torch.float64)
    t = torch.linspace(0.1, 0.9, len(x), dtype=torch.float64)
    with torch.no_grad():
        followed = follow(field, t, x, products=False)
        terms = followed.trace.terms(followed.output)
        uncut = contract.contraction(Network(terms, bases_of(terms), frozenset()), D)
        result = followed.divergence(uncut, None)
    torch.testing.assert_close(result, divergence(field, t, x, Autograd()).detach(), rtol=1e-10, atol=1e-10)
    for cycle in uncut.cycles:
        assert sum(diagonal is not None for diagonal in cycle.diagonals) <= 2
    assert any(cycle.numbers for cycle in uncut.cycles)


def test_numbers_of_each_sample_leave_a_score_its_closed_form():
    net, x = (
        Plain(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64)),
        torch.randn(64, 64),
    )

    def field(t, x):
        t = t.reshape(-1, 1)
        return net(t, x / (1 + t)) * t.exp() - x * t

    shared, own = (Exact().explain(field, t, x) for t in (torch.tensor(0.3), torch.linspace(0.1, 0.9, len(x))))
    assert "carried through" not in own.why
    assert own.cost_in_forward_passes <= 1.1 * shared.cost_in_forward_passes < 3


def test_chunks_of_the_longer_products():
    field, x = make("four hidden layers", torch.float64)
    x.requires_grad_()
    expected = torch.autograd.grad(divergence(field, 0.3, x, Autograd()).sum(), x)
    for chunk_size in (1, 2, 100):
        estimator = Exact("layered", chunk_size)
        torch.testing.assert_close(torch.autograd.grad(divergence(field, 0.3, x, estimator).sum(), x), expected)

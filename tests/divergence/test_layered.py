"""The layered method against the loop over dimensions: values, first and second derivatives, on every kind of network."""

import contextlib
import itertools

import pytest
import torch
from catalogue import true_jacobian
from covering import alternated
from torch import nn
from written import D, tagged
from written.fields import DEFAULT, FIELDS
from written.networks import NETWORKS, Plain
from written.pieces import PIECES

from divflow.divergence import Autograd, Exact, FieldError, divergence
from divflow.divergence.exact.followed import follow
from divflow.divergence.exact.layered import contract
from divflow.divergence.exact.layered.choose import choose
from divflow.divergence.exact.layered.cuts import Network
from divflow.divergence.exact.layered.method import divergence_of
from divflow.divergence.exact.layered.paths import bases_of
from divflow.operators import gradient, laplacian
from divflow.verification import severed_fields

LAYERED = Exact("layered")


@pytest.fixture(autouse=True)
def _derivatives_are_those_of_autograd():
    """Whatever is detached, or has a backward pass that is another function's: the methods are compared with one another."""
    with severed_fields("allow"):
        yield


TIMES = {"scalar t": lambda k: torch.tensor(0.3), "t per sample": lambda k: torch.linspace(0.1, 0.9, k)}

FOLLOWED = tagged(FIELDS, "layered", without=["random", "stateful"])
TWICE = [name for name in FOLLOWED if "once" not in FIELDS[name].tags]
WHOLE = [name for name in FOLLOWED if name in NETWORKS or name not in TWICE]


def make(name, dtype):
    torch.manual_seed(0)
    return FIELDS[name].function().to(dtype), torch.randn(4, D, dtype=dtype)


def by_sample(name, time, dtype):
    """Whether a field is the same one of a single sample of the batch, in that precision."""
    tags = FIELDS[name].tags
    return not (
        "joint" in tags or ("timed" in tags and time != "scalar t") or ("double" in tags and dtype != torch.float64)
    )


def value_and_divergence(name, time, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
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


@alternated(name=WHOLE, time=TIMES, dtype=[torch.float64, torch.float32])
def test_value_and_divergence(name, time, dtype):
    value_and_divergence(name, time, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "time", "dtype"),
    [
        case
        for case in itertools.product(FOLLOWED, TIMES, [torch.float64, torch.float32])
        if case[0] not in WHOLE and by_sample(*case)
    ],
)
def test_value_and_divergence_of_parts(name, time, dtype):
    value_and_divergence(name, time, dtype)


def first_and_second_derivatives(name, time):
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
        results.append((value, div, *first, *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * (1 + a.abs().max().item()))
    assert "products of its own" not in LAYERED.explain(field, t, x).why


@alternated(name=[name for name in TWICE if name in DEFAULT], time=TIMES)
def test_first_and_second_derivatives(name, time):
    first_and_second_derivatives(name, time)


@pytest.mark.slow
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", [name for name in TWICE if name not in DEFAULT])
def test_first_and_second_derivatives_of_others(name, time):
    first_and_second_derivatives(name, time)


def a_verified_call_gives_the_same_bits(name, requires_grad):
    """Calls 1, 2 and 4 are verified, 3 and 5 are not; a run that is resumed counts anew, and must end with the same."""
    field, x = make(name, torch.float32)
    field.requires_grad_(requires_grad)
    with torch.set_grad_enabled(requires_grad):
        results = [divergence(field, 0.3, x, LAYERED).detach() for _ in range(5)]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@alternated(name=WHOLE, requires_grad=[False, True])
def test_a_verified_call_gives_the_same_bits(name, requires_grad):
    a_verified_call_gives_the_same_bits(name, requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", [name for name in FOLLOWED if name not in WHOLE and "double" not in FIELDS[name].tags])
def test_a_verified_call_gives_the_same_bits_of_parts(name, requires_grad):
    a_verified_call_gives_the_same_bits(name, requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", tagged(FIELDS, without=["layered", "random", "stateful"]))
def test_what_has_no_closed_form_is_exact_all_the_same(name):
    field, x = make(name, torch.float64)
    expected = divergence(field, 0.3, x, Autograd()).detach()
    for _ in range(2):
        torch.testing.assert_close(divergence(field, 0.3, x).detach(), expected, rtol=1e-10, atol=1e-10)
    with contextlib.suppress(FieldError):
        assert "products of its own" in LAYERED.explain(field, 0.3, x).why
        torch.testing.assert_close(divergence(field, 0.3, x, LAYERED).detach(), expected, rtol=1e-10, atol=1e-10)


def forms(name):
    """An activation as a function of torch's namespaces, and as a method: F.leaky_relu of LeakyReLU."""
    for namespace in (nn.functional, torch, torch.special, torch.Tensor):
        for found in dir(namespace):
            if found.replace("_", "") == name.lower() and not found.endswith("_"):
                yield getattr(namespace, found)


# These take more arguments.
@pytest.mark.parametrize("name", sorted(set(tagged(PIECES, "activation")) - {"PReLU", "Threshold"}))
def test_functional_and_method_form(name):
    x = torch.randn(3, 4, dtype=torch.float64)
    for form in forms(name):
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


@pytest.mark.parametrize("name", tagged(FIELDS, "layered", "random"))
def test_one_draw_of_noise(name):
    field, x = make(name, torch.float64)
    results = []
    for estimator in (LAYERED, LAYERED, Autograd()):
        torch.manual_seed(3)
        results.append(estimator(field, 0.3, x))
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
    "a sample": (lambda: lambda x: x + 0 * x[0], "getitem over the batch"),
    "running statistics": (_running_statistics, "keeps running statistics"),
    "written into a buffer": (lambda: lambda x: torch.zeros_like(x).index_copy_(1, torch.arange(6), x), "index_copy_"),
    "changed through a view": (lambda: _through_a_view, "through another view"),
    "changed after an operation without a rule": (lambda: _changed_later, "a change in place of a value"),
    "random": (lambda: lambda x: torch.nn.functional.gumbel_softmax(x @ W, dim=1), "is random"),
}
OPAQUE = {
    "softmax to another precision": (lambda: lambda x: x @ W + x.softmax(1, dtype=torch.float64), "to another dtype"),
    "custom function": (lambda: Reversed.apply, "ReversedBackward is hidden from torch functions"),
    "custom function inside": (lambda: lambda x: x.sin() * 2 + Reversed.apply(x.cos()), "hidden from torch functions"),
    "custom functions one after another": (
        lambda: lambda x: Reversed.apply(Reversed.apply(x.cos()) @ W) * x,
        "hidden from torch functions",
    ),
    "custom function of two values": (lambda: lambda x: Gated.apply(x.sin(), x @ W) @ W, "GatedBackward is hidden"),
    "custom function in a residual branch": (lambda: lambda x: x + Reversed.apply(x @ W.sum(1, True)), "is hidden"),
    "the largest entry": (lambda: lambda x: x @ W * x.max(dim=1).values[:, None], "max has no rule"),
    "sorted": (lambda: lambda x: x.sort(dim=1).values, "sort has no rule"),
    "gathered": (lambda: lambda x: x.gather(1, x.argsort(dim=1)), "gather between samples"),
    "scripted": (lambda: torch.jit.script(_scripted), "hidden from torch functions"),
    "a gradient": (lambda: _gradient, "hidden from torch functions"),
    "distances": (lambda: lambda x: torch.cdist(x[:, None], W[None]).flatten(1) @ W, "cdist has no rule"),
    "fused attention": (lambda: _attention, "scaled_dot_product_attention has no rule"),
    "a product of two values": (lambda: lambda x: (x.view(-1, 2, 3) @ (x.sin()).view(-1, 3, 2)).flatten(1) @ W[:4], "matmul of several values of x"),
    "a matrix a sample": (lambda: _matrix_a_sample, "einsum without a matrix that the batch shares"),
    "a scan": (lambda: lambda x: torch.cumprod(1 + x * x, dim=1), "cumprod has no rule"),
}  # fmt: skip


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        gate = b.sigmoid()
        return gradient * gate, gradient * a * gate * (1 - gate)


def _attention(x):
    q, k, v = (x @ torch.cat([W, W.T, W * 2], dim=1)).view(-1, 3, 3, 2).unbind(1)
    return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


def _matrix_a_sample(x):
    scales = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None, None]
    return torch.einsum("bij,bj->bi", W + scales * W.T, x.sin())


def _through_a_view(x):
    y = x * 2
    y[:, :3].mul_(x[:, :3])
    return y.sin()


def _changed_later(x):
    y = x.sort(dim=1).values
    y.mul_(2)
    return y @ W


def _scripted(x):
    return x * x


def _gradient(x):
    z = x.detach().requires_grad_() if not x.requires_grad else x
    return torch.autograd.grad((z**4).sum(), z, create_graph=True)[0]


def field_of(make_function, name):
    torch.manual_seed(0)
    function = make_function()
    function = function.double() if isinstance(function, nn.Module) and name != "scripted" else function
    return lambda t, x: function(x)


@pytest.mark.parametrize("name", NOT_LAYERED)
def test_what_can_not_be_followed_is_exact_all_the_same(name):
    make_function, reason = NOT_LAYERED[name]
    field, x = field_of(make_function, name), torch.randn(5, 6, dtype=torch.float64)
    plan = Exact().explain(field, 0.0, x)
    assert plan.method != "layered"
    assert plan.method == "colored" or reason in plan.why
    for _ in range(2):
        results = []
        for estimator in (Exact(), Autograd()):
            torch.manual_seed(3)
            results.append(divergence(field, 0.0, x, estimator))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    with pytest.raises(FieldError, match=reason):
        divergence(field, 0.0, x, LAYERED)


@pytest.mark.parametrize("name", OPAQUE)
def test_what_has_no_rule_is_carried_through_by_its_own_products(name):
    """By the layered method where it is asked for, at any price; the cheapest way names it, whichever it is."""
    make_function, reason = OPAQUE[name]
    field, x = field_of(make_function, name), torch.randn(5, 6, dtype=torch.float64)
    plan, layered = Exact().explain(field, 0.0, x), LAYERED.explain(field, 0.0, x)
    assert reason in layered.why
    assert "forward passes" in layered.why
    assert plan.method == "colored" or reason in plan.why
    expected = divergence(field, 0.0, x, Autograd())
    for estimator in (Exact(), LAYERED, Exact("layered", chunk_size=2)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for _ in range(2):
                with mode():
                    result = divergence(field, 0.0, x, estimator).clone()
                torch.testing.assert_close(result.detach(), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(OPAQUE) - {"distances"}))  # torch has no second derivative of cdist
def test_gradients_through_what_has_no_rule(name):
    field, x = field_of(OPAQUE[name][0], name), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    gradients = []
    for estimator in (Autograd(), LAYERED, Exact("layered", chunk_size=2)):
        total = (divergence(field, 0.0, x, estimator) * torch.linspace(1, 2, 5, dtype=x.dtype)).sum() + 0 * x.sum()
        gradients.append(torch.autograd.grad(total, x)[0])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-9, atol=1e-9)


def test_one_narrow_operation_does_not_cost_a_network_its_closed_form():
    """Of 64 dimensions through a place of four: four rows, not 64."""
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 4)).double()
    last = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 64)).double()
    x = torch.randn(16, 64, dtype=torch.float64)

    def field(t, x):
        return last(net(x).cumprod(dim=1)) + x.tanh()

    plan = Exact().explain(field, 0.0, x)
    assert plan.method == "layered"
    assert "4 rows carried through 1 of its places; cumprod has no rule" in plan.why
    assert plan.cost_in_forward_passes < 16
    torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))


def checkpointed(function):
    return lambda t, x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize("k", [1, 5, 6])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_hidden_function_within_a_checkpoint_is_not_followed(k, mode):
    """What it saves is counted by the checkpoint, and would be given back as another tensor."""
    x = torch.randn(k, 6, dtype=torch.float64)

    def function(z):
        return Gated.apply((z @ W).exp().sin(), z.cos()).tanh()

    field = checkpointed(function)
    expected = divergence(lambda t, x: function(x), 0.0, x, Autograd())
    with mode():
        for _ in range(3):
            torch.testing.assert_close(divergence(field, 0.0, x).detach(), expected)
        assert "checkpoint" in Exact().explain(field, 0.0, x).why.lower()
    f = lambda x: field(0.0, x).sum(1)  # noqa: E731
    whole = Autograd()(lambda _, z: gradient(lambda y: function(y).sum(1), z), 0.0, x).divergence
    for _ in range(2):
        torch.testing.assert_close(laplacian(f, x), whole)


def test_an_opaque_operation_that_mixes_samples_ends_the_attempt():
    """One that another undoes is no fault of the field's."""

    def field(t, x):
        return x.sort(dim=0).values.flip(0).sin() * 0 + x.cos() + x.cummax(dim=0).values * 0

    x = torch.randn(5, 6, dtype=torch.float64)
    assert "mixes the samples of a batch" in Exact().explain(field, 0.0, x).why
    with pytest.raises(FieldError, match="mixes the samples"):
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
    assert Exact().explain(NETWORKS["two hidden layers"].function(), 0.0, x).method == "layered"
    deep = Exact().explain(NETWORKS["deep residual"].function(), 0.0, torch.randn(64, D))
    assert deep.method == "reverse"
    assert "paths" in deep.why
    gated = NETWORKS["divflow ConcatSquash"].function()
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


@pytest.mark.parametrize("name", ["two layer norms", "layers of InstanceNorm1d"])
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


def test_a_deep_residual_network_has_a_plan():
    """Its paths, of which there are more than could be listed, are counted first."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.layer(self.norm(x).tanh())

    net, x = nn.Sequential(*[Block() for _ in range(24)]).double(), torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        divergence(lambda t, x: net(x), 0.0, x), divergence(lambda t, x: net(x), 0.0, x, Autograd())
    )


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
    [
        "two layer norms",
        "layer norm before blocks",
        "four hidden layers",
        "residual",
        "glu",
        "layers of softmax and layer norm",
    ],
)
def test_the_trace_is_the_same_wherever_paths_are_cut(name):
    """The paths through a place and those past it are all of them: no cut changes their sum, in bundles or not."""
    field, x = make(name, torch.float64)
    expected = divergence(field, 0.3, x, Autograd()).detach()
    with torch.no_grad():
        followed = follow(field, torch.tensor(0.3, dtype=torch.float64), x, products=False)
        terms = followed.reader.terms(followed.tape, followed.output)
        bases = bases_of(terms)
        cuts = [(*rest, bases[-1]) for r in range(3) for rest in itertools.combinations(bases[:-1], r)]
        networks = [Network(terms, bases, frozenset(map(id, cut))) for cut in [*cuts, bases]]
        for network in [*networks, choose(terms, len(x))]:
            for chunk_size in (None, 2):
                result = divergence_of(followed, contract.contraction(network, D), chunk_size)
                torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


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
        terms = followed.reader.terms(followed.tape, followed.output)
        uncut = contract.contraction(Network(terms, bases_of(terms), frozenset()), D)
        result = divergence_of(followed, uncut, None)
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


@pytest.mark.parametrize("moved", [False, True])
def test_terms_that_cancel_leave_a_network_its_closed_form(moved):
    """A velocity between noise and noise is the small difference of large terms: what rounding leaves is no other Jacobian."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)), torch.randn(64, D)

    def g(t, x):
        drift, score = -1000 * x, 1000.001 * (x.flip(1) if moved else x)
        difference = drift + (score.flip(1) if moved else score)
        return 1e-4 * net(x) + 0.5 * difference

    plan = Exact().explain(g, 0.5, x)
    assert plan.method == "layered", plan.why
    with torch.no_grad():
        slopes = 1 - net[:2](x).double() ** 2
        inside = torch.einsum("ij,kj,ji->k", net[2].weight.double(), slopes, net[0].weight.double())
        assert Exact()(g, 0.5, x)[1].double().sub(1e-4 * inside + 0.0005 * D).abs().max() < 1e-4 * D


def test_chunks_of_the_longer_products():
    field, x = make("four hidden layers", torch.float64)
    x.requires_grad_()
    expected = torch.autograd.grad(divergence(field, 0.3, x, Autograd()).sum(), x)
    for chunk_size in (1, 2, 100):
        estimator = Exact("layered", chunk_size)
        torch.testing.assert_close(torch.autograd.grad(divergence(field, 0.3, x, estimator).sum(), x), expected)

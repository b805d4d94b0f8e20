"""Fields that once got a wrong number, or might: what a plan was made for, and what the field does later.

Each is evaluated at several points in turn, since what is verified at one need not hold at the next.
"""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Autograd, Exact, FieldError, divergence

torch.manual_seed(0)
X, SQUARE, LONG = torch.randn(5, 6), torch.randn(6, 6), torch.randn(3, 32)
W, EACH = torch.randn(6, 6), torch.randn(6, 6, 6)
IMAGE = torch.randn(2, 1, 8, 8)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Changing(nn.Module):
    """A field whose constants are changed between calls."""

    def __init__(self, function, **values):
        super().__init__()
        self.function, self.values = function, values
        self.weight = nn.Parameter(torch.zeros(()))
        self.switch(0)

    def switch(self, turn):
        self.weight.data.fill_(float(turn))
        for name, choices in self.values.items():
            setattr(self, name, choices[turn])

    def forward(self, t, x):
        return self.function(self, t, x)


def adjacent(size):
    return torch.eye(size) + torch.diag(torch.ones(size - 1), 1) + torch.diag(torch.ones(size - 1), -1)


def warp(t, x):
    theta = torch.eye(2, 3)[None].repeat(len(x), 1, 1)
    theta[:, 0, 2] += t
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) * x + x * x


def hidden_rolls(t, x):
    z, n = Double.apply(x), 1 if t < 0.5 else 2
    return z * torch.roll(z, n, 1) * torch.roll(z, -n, 1) + torch.roll(z, n - 1, 1) ** 2


CONSTANT, INDEX = torch.randn(5, 6), np.arange(2000)
LATER = INDEX.copy()
LATER[1000:1010] = LATER[1000:1010][::-1]
TRUE = torch.ones(6).bool()


def zoomed(t, x):
    """Of the same size, but not of the same entries, for t in [0, 1]."""
    return F.interpolate(x, scale_factor=1.52 + 0.06 * t.item(), mode="bilinear")[..., :8, :8] * x


# Each: the field, and the points in turn.
IN_TIME = {
    "a scale of another number": (zoomed, IMAGE),
    "entries chosen by the time": (lambda t, x: x.index_select(1, torch.arange(6).roll(int(4 * t))) @ W, X),
    "a matrix for each of k = D samples": (lambda t, x: t * torch.einsum("bij,bj->bi", EACH, x) - x / 2, SQUARE),
    "the same by matmul": (lambda t, x: t * torch.matmul(x[:, None], EACH)[:, 0] - x / 2, SQUARE),
    "a small matrix for each": (lambda t, x: x + 1e-3 * torch.einsum("bij,bj->bi", EACH, x), SQUARE),
    "a custom function, later": (lambda t, x: x @ W + (Double.apply(x) if t > 0.4 else torch.zeros(5, 6)), X),
    "vmap, later": (lambda t, x: x @ W + (torch.func.vmap(lambda z: z * 3)(x) if t > 0.4 else torch.zeros(5, 6)), X),
    "an image sampled elsewhere": (warp, IMAGE),
    "rolls behind a custom function": (hidden_rolls, LONG),
    "complex numbers": (lambda t, x: (x * torch.exp(1j * t.to(torch.complex64)) + 0.5).abs(), X),
    "a gradient inside, later": (
        lambda t, x: torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0] if t > 0.4 else x.cos() @ W,
        X,
    ),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", IN_TIME)
def test_later_in_time(name, mode):
    field, x = IN_TIME[name]
    for t in (0.0, 1.0, 0.25, 0.5):
        with mode():
            torch.testing.assert_close(
                divergence(field, t, x).detach(), divergence(field, t, x, Autograd()).detach(), rtol=1e-4, atol=1e-4
            )


AFTER_A_CHANGE = {
    "a constant converted like x": (Changing(lambda m, t, x: torch.tanh(x @ W) + m.weight * CONSTANT.to(x)), X),
    "a hidden bias": (Changing(lambda m, t, x: torch.addmm(Double.apply(x) * m.weight, x, W)), X),
    "indices of numpy": (Changing(lambda m, t, x: x[:, m.i] * 3, i=(INDEX, LATER)), torch.randn(2, 2000)),
    "masks that are added": (Changing(lambda m, t, x: x * m.a + x * TRUE, a=(~TRUE, TRUE)), X),
    "bytes that are multiplied": (
        Changing(lambda m, t, x: x * m.a * m.a, a=(torch.full((6,), 3).byte(), torch.full((6,), 20).byte())),
        X,
    ),
    "a sparse matrix": (
        Changing(
            lambda m, t, x: torch.tanh(torch.sparse.mm(m.A, torch.tanh(x).mT).mT),
            A=(torch.eye(32).to_sparse(), adjacent(32).to_sparse()),
        ),
        LONG,
    ),
    "a power of a parameter": (
        Changing(lambda m, t, x: torch.pow(m.weight + 1, (x.roll(1, 1) + x.roll(-1, 1))) * x),
        LONG,
    ),
    "a norm that is bounded": (
        Changing(lambda m, t, x: torch.renorm((x * (0.01 + 10 * m.weight)).reshape(-1, 4), 2, 0, 1.0).view_as(x) * x),
        LONG,
    ),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", AFTER_A_CHANGE)
def test_after_a_change(name, mode):
    field, x = AFTER_A_CHANGE[name]
    for turn in (0, 1, 0):
        field.switch(turn)
        with mode():
            torch.testing.assert_close(
                divergence(field, 0.0, x).detach(), divergence(field, 0.0, x, Autograd()).detach(), rtol=1e-4, atol=1e-3
            )


@pytest.mark.parametrize("kind", ["time", "context"])
def test_gradients_of_expanded_tensors(kind):
    """Rows that share memory have a gradient each."""
    leaf = (torch.tensor(0.5).expand(5) if kind == "time" else torch.ones(1, 6).expand(5, 6)).requires_grad_()

    def field(t, x):
        return torch.tanh(x @ W) + x * leaf[:, None] if kind == "time" else torch.tanh(x) * leaf

    gradients = [torch.autograd.grad(divergence(field, 0.0, X, e).sum(), leaf)[0] for e in (Exact(), Autograd())]
    torch.testing.assert_close(*gradients)


def test_hooks_that_change_gradients():
    parameter = nn.Parameter(torch.randn(6, 6))

    def forward(m, t, x):
        h = torch.tanh(x @ parameter)
        h.register_hook(lambda gradient: gradient * m.scale)
        return h @ W

    field = Changing(forward, scale=(1.0, 2.0))
    for turn in (0, 1):
        field.switch(turn)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                torch.testing.assert_close(
                    divergence(field, 0.0, X).detach(), divergence(field, 0.0, X, Autograd()).detach()
                )


@pytest.mark.parametrize("name", ["prelu", "atan2", "relu", "maximum", "leaky_relu", "hardtanh"])
def test_kinks_have_autograds_derivative_at_every_call(name):
    functions = {
        "prelu": lambda u: F.prelu(u, torch.tensor([0.3])),
        "atan2": lambda u: torch.atan2(u, 2 * u + 1),
        "maximum": lambda u: torch.maximum(u, 0 * u),
        "hardtanh": F.hardtanh,
    }
    function = functions.get(name, getattr(F, name, None))
    for x in (torch.randn(4, 3), torch.zeros(4, 3), torch.ones(4, 3)):
        torch.testing.assert_close(
            divergence(lambda t, x: function(x), 0.0, x), divergence(lambda t, x: function(x), 0.0, x, Autograd())
        )


class Stateful(nn.Module):
    """A running mean of what it has seen."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.conv = in_place, nn.Conv1d(1, 1, 3, padding=1)
        self.register_buffer("mean", torch.ones(()))

    def forward(self, t, x):
        seen = 0.1 * x.detach().abs().mean()
        if self.in_place:
            self.mean.mul_(0.9).add_(seen)
        else:
            self.mean = 0.9 * self.mean + seen
        return self.conv(x[:, None] / self.mean.clone())[:, 0].tanh() * x


@pytest.mark.parametrize("in_place", [False, True])
def test_the_state_of_a_field_is_advanced_once_a_call(in_place):
    fields = [Stateful(in_place) for _ in range(2)]
    fields[1].load_state_dict(fields[0].state_dict())
    for _ in range(3):
        torch.testing.assert_close(
            *(divergence(f, 0.0, LONG, e, detached=True) for f, e in zip(fields, (Exact(), Autograd()), strict=True))
        )
        torch.testing.assert_close(fields[0].mean, fields[1].mean)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_random_numbers_are_drawn_once(mode):
    layer, glu = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 12), nn.GLU(), nn.Dropout(0.5))

    def field(t, x):
        return F.dropout(layer(x).tanh() if t < 0.5 else layer(x).tanh() * 2 + layer(x), 0.5) + glu(x)

    for t in (0.0, 1.0, 1.0, 0.0):
        results = []
        for estimator in (Exact(), Autograd()):
            torch.manual_seed(3)
            with mode():
                results.append((divergence(field, t, X, estimator).detach(), torch.rand(2)))
        torch.testing.assert_close(*results)


def test_what_the_field_knows_of_x_does_not_change_from_call_to_call():
    def field(t, x):
        h = torch.tanh(x @ W)
        h.retain_grad()
        return h @ W

    for mode in (torch.enable_grad, torch.no_grad, torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(divergence(field, 0.0, X), divergence(field, 0.0, X, Autograd()))


def test_half_precision_is_verified_too():
    x = SQUARE.bfloat16()
    each = EACH.bfloat16()
    actual, expected = (
        divergence(lambda t, x: x + torch.einsum("bij,bj->bi", each, x), 0.0, x, e) for e in (Exact(), Autograd())
    )
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=5e-2)


SORTED = nn.Linear(6, 5), nn.Linear(5, 6)


def in_order(t, x):
    h = SORTED[0](x).tanh()
    return SORTED[1](h.gather(1, h.argsort(1)))


@pytest.mark.parametrize("batch", [1, 3])
def test_entries_chosen_by_x_are_followed_anew(batch):
    """All samples are in one order at first, and then each in its own."""
    for x in (torch.zeros(batch, 6), torch.randn(batch, 6), torch.randn(batch, 6)):
        torch.testing.assert_close(divergence(in_order, 0.0, x), divergence(in_order, 0.0, x, Autograd()))


def test_a_method_that_applies_no_more_is_refused():
    layered = Exact("layered")

    def written(t, x):
        return torch.zeros_like(x).index_copy_(1, torch.arange(6), x) if x.any() else x.sin()

    divergence(written, 0.0, torch.zeros(3, 6), layered)
    with pytest.raises(FieldError, match=r"'layered' does not apply.*index_copy_ has no rule.*method='auto'"):
        divergence(written, 0.0, torch.randn(3, 6), layered)


@pytest.mark.parametrize("labels", [torch.tensor([[1, 0]]), torch.tensor([[True, False]])])
@pytest.mark.parametrize("size", [1, 3])
def test_integers_beside_x_are_no_numbers_of_entries(labels, size):
    """One sample, and a last layer of zeros: products with the whole Jacobian show nothing."""
    first, last = nn.Linear(size + 2, 5), nn.Linear(5, size)
    nn.init.zeros_(last.weight)
    x = torch.randn(1, size)

    def field(t, x):
        return last(first(torch.cat([labels, x], dim=1)).tanh())

    for _ in range(3):
        torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))
        assert Exact().explain(field, 0.0, x).method == "layered"
        nn.init.normal_(last.weight)


@pytest.mark.parametrize("method", ["auto", "colored"])
def test_a_local_field_that_sees_nothing(method):
    def cropped_away(t, x):
        return F.pad(x, (-32, 32))

    torch.testing.assert_close(divergence(cropped_away, 0.0, LONG, Exact(method)), torch.zeros(3))


def test_a_counter_outside_of_any_module_is_advanced_once_a_call():
    conv, count = nn.Conv1d(1, 1, 3, padding=1), [0]

    def counting(t, x):
        count[0] += 1
        return conv(x[:, None])[:, 0].tanh() * x

    for calls in (1, 2, 3):
        divergence(counting, 0.0, LONG)
        assert count == [calls]


def test_from_several_threads_at_once():
    net, failures = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)), []
    points = [torch.randn(1 + i % 4, 6) for i in range(40)]
    expected = [divergence(lambda t, x: net(x), 0.0, x, Autograd()).detach() for x in points]

    def work(scale):
        try:
            for x, true in zip(points, expected, strict=True):
                torch.testing.assert_close(divergence(lambda t, x: scale * net(x), 0.0, x).detach(), scale * true)
        except BaseException as error:  # it would end with the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Alternating(nn.Module):
    """Another field at every second call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        return x.sin() @ W if self.calls % 2 else x.flip(1) * x


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_field_that_changes_with_its_state_is_evaluated_once_a_call(mode):
    fields = Alternating(), Alternating()
    for call in range(1, 8):
        with mode():
            results = [divergence(f, 0.0, X, e).detach() for f, e in zip(fields, (Exact(), Autograd()), strict=True)]
        torch.testing.assert_close(*results)
        assert fields[0].calls == call


def test_after_inference_mode_a_field_can_be_trained():
    def field(t, x):
        return torch.roll(x, 1, 3) * x

    with torch.inference_mode():
        divergence(field, 0.0, IMAGE)
    x = IMAGE.clone().requires_grad_()
    results = [torch.autograd.grad(divergence(field, 0.0, x, e).square().sum(), x)[0] for e in (Exact(), Autograd())]
    torch.testing.assert_close(*results)


def test_forward_mode_without_a_rule_names_the_remedy():
    with pytest.raises(FieldError, match=r"method='forward' does not apply.*Use method='reverse'"):
        divergence(lambda t, x: Double.apply(x) * x, 0.0, X, Exact("forward"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # the field's own error stays what it is
        divergence(lambda t, x: x @ torch.zeros(3, 3), 0.0, X, Exact("forward"))


def test_true_and_one_are_two_indices():
    """They are equal keys of a dict, and other movements."""
    x = torch.randn(4, 6)
    for field in (lambda t, x: x[:, 1][:, None].expand(-1, 6) * x, lambda t, x: x[:, True].reshape(len(x), 6) * x):
        torch.testing.assert_close(divergence(field, 0.0, x), divergence(field, 0.0, x, Autograd()))

"""Local fields with normalizations between: a local part by colours, statistics beside, and the same divergence as the loop's."""

import pytest
import torch
from covering import alternated
from torch import nn
from torch.nn import functional as F

from divflow.divergence import Autograd, Exact, FieldError, divergence
from divflow.divergence.exact.colored import statistics
from divflow.verification import severed_fields


@pytest.fixture(autouse=True)
def _derivatives_are_those_of_autograd():
    """Whatever is detached: the methods are compared with one another."""
    with severed_fields("allow"):
        yield


def stack(*norms, channels=1, kind=nn.Conv2d, hidden=4):
    """Convolutions with a normalization after each but the last."""
    layers = [kind(channels, hidden, 3, padding=1)]
    for norm in norms:
        layers += [norm, nn.SiLU(), kind(hidden, hidden, 3, padding=1)]
    layers[-1] = kind(hidden, channels, 3, padding=1)
    return nn.Sequential(*layers)


class OfTime(nn.Module):
    """A network of x alone, times t, which may be one a sample."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(x) * t.reshape(-1, *[1] * (x.ndim - 1)).cos()


class Scaled(nn.Module):
    """Scale and shift from time after the normalization, and residual connections, as diffusion UNets have them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.SiLU())

    def forward(self, t, x):
        scale, shift = self.time(t.reshape(-1, 1).expand(len(x), 1))[..., None, None].chunk(2, dim=1)
        h = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(F.silu(norm(h) * (1 + scale) + shift))
        return self.last(h) + x


class OfPixels(nn.Module):
    """The channels of each pixel are normalized, which is local, and the whole image."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.pixel, self.norm = nn.LayerNorm(4), nn.GroupNorm(1, 4)

    def forward(self, t, x):
        return self.last(self.norm(self.pixel(self.first(x).movedim(1, -1)).movedim(-1, 1).tanh()).sin())


# The network, the event, colours at least and at most, and what explain says of the statistics.
FIELDS = {
    "one group": (lambda: OfTime(stack(nn.GroupNorm(1, 4))), (1, 9, 8), (9, 9), "2 statistics of 1 normalization"),
    "two groups": (lambda: OfTime(stack(nn.GroupNorm(2, 4))), (1, 9, 8), (9, 9), "4 statistics of 1 normalization"),
    "without weights": (lambda: OfTime(stack(nn.GroupNorm(1, 4, affine=False))), (1, 9, 8), (9, 9), "2 statistics"),
    "of channels": (lambda: OfTime(stack(nn.InstanceNorm2d(4, affine=True))), (1, 9, 8), (9, 9), "8 statistics"),
    "of layers": (lambda: OfTime(stack(nn.LayerNorm((4, 9, 8)))), (1, 9, 8), (9, 9), "2 statistics"),
    "root mean square": (lambda: OfTime(stack(nn.RMSNorm((4, 9, 8)))), (1, 9, 8), (9, 9), "1 statistics"),
    "1-D": (
        lambda: OfTime(stack(nn.GroupNorm(1, 4), nn.InstanceNorm1d(4), kind=nn.Conv1d, channels=2)),
        (2, 26),
        (8, 8),
        "10 statistics of 2 normalizations",
    ),
    "three": (
        lambda: OfTime(stack(nn.GroupNorm(1, 4), nn.GroupNorm(1, 4, eps=0.1), nn.GroupNorm(2, 4))),
        (1, 9, 9),
        (25, 25),
        "8 statistics of 3 normalizations",
    ),
    "at both ends": (
        lambda: OfTime(nn.Sequential(nn.GroupNorm(1, 1), stack(nn.Identity()), nn.GroupNorm(1, 1), nn.Tanh())),
        (1, 8, 8),
        (9, 9),
        "4 statistics of 2 normalizations",
    ),
    "scale, shift and residuals": (Scaled, (1, 8, 8), (16, 16), "8 statistics of 2 normalizations"),
    "and of pixels": (OfPixels, (1, 8, 8), (4, 4), "2 statistics of 1 normalization"),
}


def make(name):
    torch.manual_seed(0)
    network, event, colors, said = FIELDS[name]
    field = network().double()
    for parameter in field.parameters():  # weights of ones and zeros would hide which is which
        nn.init.normal_(parameter, std=0.5)
    return field, torch.randn(3, *event, dtype=torch.float64), colors, said


TIMES = {"one time": 0.3, "times": torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)}


@alternated(name=FIELDS, time=TIMES)
def test_value_divergence_and_derivatives(name, time):
    field, x, (least, most), said = make(name)
    x.requires_grad_()
    t = torch.as_tensor(TIMES[time], dtype=torch.float64).clone().requires_grad_()
    plan = Exact().explain(field, t, x)
    assert plan.method == "colored"
    assert said in plan.why
    count = int(plan.why.split(", and ")[1].split()[0])
    assert least <= plan.products - 2 * count <= most
    inputs, results = [x, t, *field.parameters()], []
    for estimator in (Exact(), Exact("auto", chunk_size=3), Autograd()):
        value, div = estimator(field, t, x)
        first = torch.autograd.grad((div**2).sum(), inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
        results.append(((value,), (div,), first, second))
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            # A bias before a normalization has a derivative of zero, to rounding of what is added up.
            scale = 1 + max(entry.abs().max().item() for entry in expected)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * scale)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(Exact()(field, t.detach(), x).divergence.clone(), results[-1][1][0].detach())


@pytest.mark.parametrize("name", ["two groups", "scale, shift and residuals"])
def test_verified_calls_give_the_same_bits(name):
    field, x, _, _ = make(name)
    results = [torch.stack([*Exact()(field, 0.3, x)[1:2]]) for _ in range(5)]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_in_single_precision_and_far_from_zero():
    field, x, _, _ = make("three")
    field, x = field.float(), x.float()
    torch.testing.assert_close(
        divergence(field, 0.3, x).double(),
        divergence(field.double(), 0.3, x.double(), Autograd()),
        rtol=1e-4,
        atol=1e-3,
    )
    field, x, _, _ = make("at both ends")
    torch.testing.assert_close(divergence(field, 0.3, x + 1e3), divergence(field, 0.3, x + 1e3, Autograd()))


NOT_PAYING = {
    "statistics": (stack(*[nn.GroupNorm(2, 4)] * 2), (1, 6, 6), "16 colours for 36 dimensions, and 8 statistics of 2"),
    "too many": (
        stack(nn.InstanceNorm2d(32), hidden=32),
        (1, 7, 7),
        "64 statistics of normalizations for 49 dimensions",
    ),
    "not local": (
        stack(nn.GroupNorm(1, 4)),
        (1, 4, 4),
        "held, the first entry of the event is seen from more than half",
    ),
}


@pytest.mark.parametrize("name", NOT_PAYING)
def test_where_it_does_not_pay_explain_says_so(name):
    net, event, why = NOT_PAYING[name]
    field, x = OfTime(net).double(), torch.randn(2, *event, dtype=torch.float64)
    plan = Exact().explain(field, 0.3, x)
    assert plan.method == "reverse"
    assert why in plan.why
    torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))
    if name == "statistics":  # it can be asked for nevertheless
        asked = Exact("colored")
        torch.testing.assert_close(divergence(field, 0.3, x, asked), divergence(field, 0.3, x, Autograd()))
    else:
        with pytest.raises(FieldError, match=why):
            divergence(field, 0.3, x, Exact("colored"))


class Applied(nn.Module):
    """A function of the entries between."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def by_hand(h):
    return (h - h.mean((1, 2, 3), keepdim=True)) / (h.var((1, 2, 3), keepdim=True) + 0.1).sqrt()


def test_a_field_that_was_changed_is_planned_anew():
    field, x, _, _ = make("two groups")
    norms = nn.GroupNorm(1, 4), nn.InstanceNorm2d(4), nn.Identity(), nn.GroupNorm(2, 4, eps=1.0), Applied(by_hand)
    for norm in norms:
        field.net[1] = norm.double()
        for _ in range(3):
            torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))
        assert (Exact().explain(field, 0.3, x).method == "colored") == (norm is not norms[-1])


def test_weights_that_start_at_zero_and_are_trained():
    field, x, _, _ = make("scale, shift and residuals")
    for parameter in (field.last.weight, field.norms[0].weight):
        nn.init.zeros_(parameter)
    for _ in range(4):
        assert Exact().explain(field, 0.3, x).method == "colored"
        torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))
        for parameter in field.parameters():
            nn.init.normal_(parameter)


def hidden(h):
    """A dependence that no torch function shows, beside the normalization."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, g):
            return g + 0.1 * g.mean()

    return Scale.apply(F.group_norm(h, 1))


def beside(h):
    return F.group_norm(h, 1) * h.detach().square().mean((1, 2, 3), keepdim=True) + h.mean((1, 2, 3), keepdim=True)


WRONG = {
    "value": lambda y, h, s: y + 1e-2 * h.detach(),
    "derivative": lambda y, h, s: y + 1e-2 * (h - h.detach()),
    "a path beside the statistics": lambda y, h, s: y * s.detach() / s,
}


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("name", WRONG)
def test_normalizations_by_other_parts_are_refused(name, later, monkeypatch):
    """Where a torch function is not what its parts are, there are no colours, and never another number."""
    field, x, _, _ = make("two groups")
    right = statistics.NORMALIZATIONS["group_norm"]

    def wrong(h, *args, **kwargs):
        mean = 2 + h.mean((1, 2, 3), keepdim=True)
        return WRONG[name](right(h, *args, **kwargs), h, mean)

    if later:
        assert Exact().explain(field, 0.3, x).method == "colored"
    monkeypatch.setitem(statistics.NORMALIZATIONS, "group_norm", wrong)
    for _ in range(3):
        torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))
    assert Exact().explain(field, 0.3, x).method != "colored"


def test_another_value_is_refused_behind_a_last_layer_of_zeros(monkeypatch):
    field, x, _, _ = make("two groups")
    nn.init.zeros_(field.net[-1].weight)
    right = statistics.NORMALIZATIONS["group_norm"]
    monkeypatch.setitem(statistics.NORMALIZATIONS, "group_norm", lambda h, *a, **k: right(h, *a, **k) * 1.01)
    assert Exact().explain(field, 0.3, x).method != "colored"
    with pytest.raises(FieldError, match="group_norm has another value"):
        divergence(field, 0.3, x, Exact("colored"))


def test_a_field_that_never_has_the_same_value_has_no_colours():
    """Its noise comes from a generator that nobody can set back."""
    field, x, _, _ = make("two groups")
    noise = torch.Generator().manual_seed(0)
    field.net.insert(1, Applied(lambda h: h + torch.randn(h.shape, generator=noise, dtype=h.dtype)))
    assert Exact().explain(field, 0.3, x).method != "colored"
    with pytest.raises(FieldError, match="another value"):
        divergence(field, 0.3, x, Exact("colored"))


def test_other_statistics_than_were_planned_for_are_not_held():
    """Under autocast a normalization is not computed by parts, and the rest is not local: this no signature tells."""
    field, x, _, _ = make("one group")
    field, x, precise = field.float(), x.float(), field.net[1].float()
    use = {"autocast": False}

    def norm(h):
        h = F.group_norm(h, 2)
        with torch.autocast("cpu", enabled=use["autocast"]):
            return precise(h)

    field.net[1] = Applied(norm)
    assert Exact().explain(field, 0.3, x).method == "colored"
    divergence(field, 0.3, x)
    use["autocast"] = True  # at the third call, which is not verified
    torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))


@pytest.mark.parametrize("function", [hidden, beside])
def test_other_paths_beside_the_statistics_are_seen(function):
    field, x, _, _ = make("two groups")
    field.net[1] = Applied(function)
    assert Exact().explain(field, 0.3, x).method != "colored"
    torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))


def recomputed(h):
    return torch.utils.checkpoint.checkpoint(F.group_norm, h, 1, use_reentrant=False)


def by_kernel(h):
    if h.grad_fn is not None and "GroupNorm" not in (h := F.group_norm(h, 1)).grad_fn.name():
        raise ValueError("not torch's own")
    return h


@pytest.mark.parametrize("function", [recomputed, by_kernel])
def test_what_bears_no_parts_has_no_colours(function):
    field, x, _, _ = make("two groups")
    field.net[1] = nn.Sequential(Applied(function), nn.Dropout(0.5))
    results = []
    for estimator in (Exact(), Exact(), Exact("reverse")):
        torch.manual_seed(0)
        results.append((*estimator(field, 0.3, x), torch.rand(3)))
    assert Exact().explain(field, 0.3, x).method != "colored"
    for result in results[:2]:
        torch.testing.assert_close(result, results[2])


class InPlace(nn.Module):
    """Changes its argument, and what is normalized."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)

    def forward(self, t, x):
        x *= 2
        h = self.norm(self.first(x))
        h += 1
        return self.last(torch.nn.functional.silu(h, inplace=True))


def test_in_place():
    field, x = InPlace().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert Exact().explain(field, 0.3, x).method == "colored"
    torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))


def test_nothing_random_is_used_up():
    """Dropout drops the same in all evaluations, and what is drawn later is what it would have been."""
    field, x, _, _ = make("two groups")
    field.net.insert(1, nn.Dropout(0.5))
    results = []
    for estimator in (Exact(), Exact(), Exact("reverse")):
        torch.manual_seed(0)
        results.append((*estimator(field, 0.3, x), torch.rand(3)))
    assert Exact().explain(field, 0.3, x).method == "colored"
    for result in results[:2]:
        torch.testing.assert_close(result, results[2])


def test_low_precision_is_left_to_dense_products():
    field, x, _, _ = make("two groups")
    assert Exact().explain(field.bfloat16(), 0.3, x.bfloat16()).method == "reverse"
    with torch.autocast("cpu", torch.bfloat16):
        assert Exact().explain(field.float(), 0.3, x.float()).method == "reverse"


def test_statistics_that_are_kept_are_no_statistics_of_x():
    """In evaluation mode an instance normalization is a map of channels; in training it changes the field's state."""
    field, x, _, _ = make("of channels")
    field.net[1] = nn.InstanceNorm2d(4, track_running_stats=True).double()
    field.net[1].running_mean.fill_(0.5)
    plan = Exact().explain(field.eval(), 0.3, x)
    assert (plan.method, plan.products) == ("colored", 9)
    torch.testing.assert_close(divergence(field, 0.3, x), divergence(field, 0.3, x, Autograd()))
    assert Exact().explain(field.train(), 0.3, x).method == "reverse"

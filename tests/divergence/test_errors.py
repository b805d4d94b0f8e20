"""What a field or an argument that is wrong gets: a FieldError that names the value and the remedy."""

import functools

import pytest
import torch
from catalogue import ESTIMATORS, Network
from torch import nn

from divflow.divergence import Exact, FieldError, Hutchinson, check_field, divergence
from divflow.flow import ContinuousFlow
from divflow.matching import ConditionalFlowMatching
from divflow.operators import jacobian

X = torch.randn(4, 3)

BAD_FIELDS = {
    "another shape": (lambda t, x: x[:, :2], r"\(4, 2\).*\(4, 3\).*return a tensor of x's shape"),
    "a sum over the batch": (lambda t, x: x.sum(), r"shape \(\) for x of shape \(4, 3\)"),
    "another dtype": (lambda t, x: x.double(), r"float64.*float32.*module\.to\(torch\.float32\)"),
    "another device": (lambda t, x: x.to("meta"), "meta.*cpu.*one device"),
    "a tuple": (lambda t, x: (x, x), "tuple, not a tensor"),
    "nothing": (lambda t, x: None, "NoneType, not a tensor"),
}


@pytest.mark.parametrize("kind", BAD_FIELDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_bad_fields(name, kind):
    field, message = BAD_FIELDS[kind]
    with pytest.raises(FieldError, match=message):
        divergence(field, 0.0, X, ESTIMATORS[name])


NET = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def of_state(x):
    return -x


@pytest.mark.parametrize("field", [NET, of_state, lambda x: -x, functools.partial(of_state)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_field_without_a_time_is_told_how_to_take_one(name, field):
    with pytest.raises(FieldError, match=r"called as g\(t, x\), but \S+ takes g\(x\).*Use lambda t, x: g\(x\)"):
        ESTIMATORS[name](field, 0.0, X)


def test_wherever_a_field_is_called_its_time_is_asked_for():
    flow = ContinuousFlow(NET, 3)
    calls = [lambda: check_field(NET, 0.0, X), lambda: Exact().explain(NET, 0.0, X), lambda: jacobian(NET, 0.0, X)]
    for call in (*calls, lambda: flow.log_prob(X), lambda: flow.sample(2), lambda: ConditionalFlowMatching()(NET, X)):
        with pytest.raises(FieldError, match=r"but Sequential takes g\(x\), without a time"):
            call()
    given = r"g\(t, x, context\), but <lambda> takes g\(x, context\).*Use lambda t, x, context: g\(x, context\)"
    for call in (
        lambda: divergence(lambda x, c: x * c, 0.0, X, context=X),
        lambda: ContinuousFlow(lambda x, c: x * c, 3).log_prob(X, X),
    ):
        with pytest.raises(FieldError, match=given):
            call()


class Swapped(nn.Module):
    """Which the order of names shows, also where broadcasting hides it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x, t):
        return self.net(torch.cat([x, t.expand(len(x), 1)], dim=1))


SWAPPED = r"called as g\(t, x\), but \S+ takes \(x, t\)\. Swap them.*lambda t, x: net\(x, t\)\.$"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_arguments_in_the_other_order_are_named(name):
    with pytest.raises(FieldError, match=SWAPPED):
        ESTIMATORS[name](Swapped(), 0.0, X)


@pytest.mark.parametrize("g", [Swapped(), lambda x, t: -x * t], ids=["module", "broadcast"])
def test_a_flow_and_a_check_refuse_the_other_order_by_its_names(g):
    for call in (lambda: ContinuousFlow(g, 3), lambda: check_field(g, 0.0, X)):
        with pytest.raises(FieldError, match=SWAPPED):
            call()
    ContinuousFlow(lambda x, y: y, 3)
    ContinuousFlow(lambda time, t: t, 3)


def test_a_class_is_no_field():
    for call in (
        lambda: ContinuousFlow(Swapped, 3),
        lambda: check_field(Swapped, 0.0, X),
        lambda: Exact()(Swapped, 0.0, X),
    ):
        with pytest.raises(FieldError, match=r"is the class Swapped. Make one of it first, Swapped\(\.\.\.\)"):
            call()
    with pytest.raises(FieldError, match="must be a module or function .*, but is a str"):
        ContinuousFlow("net", 3)


def test_a_context_that_is_missing_or_is_not_taken_is_named():
    given, plain = ContinuousFlow(lambda t, x, label: x * label, 3), ContinuousFlow(lambda t, x: x, 3)
    for call in (lambda: given.log_prob(X), lambda: given.sample(2), lambda: Exact()(lambda t, x, label: x, 0.0, X)):
        with pytest.raises(FieldError, match=r"takes \(t, x, label\), a context after t and x, but none was given"):
            call()
    with pytest.raises(FieldError, match=r"takes \(t, x\), no context, but one was given"):
        plain.log_prob(X, X)


def test_another_dtype_is_named_with_both():
    g = nn.Linear(3, 3)
    for field in (lambda t, x: g(x), TimeDropped(g)):
        for call in (
            lambda field=field: Exact()(field, 0.0, X.double()),
            lambda field=field: ContinuousFlow(field, 3).log_prob(X.double()),
        ):
            with pytest.raises(
                FieldError, match=r"x has torch.float64, but .* have torch.float32.*x.to\(torch.float32\) or"
            ):
                call()


class TimeDropped(nn.Module):
    """Whose hook takes the time away, so that its forward takes x alone and is called with x alone."""

    def __init__(self, forward):
        super().__init__()
        self.own = forward
        self.register_forward_pre_hook(lambda module, arguments: arguments[1:])

    def forward(self, x):
        return self.own(x)


def within(t, x):
    return of_state(t, x)


@functools.wraps(of_state)
def wrapping(t, x):
    raise TypeError("my own")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (within, "of_state.. takes 1 positional argument but 2 were given"),
        (wrapping, "my own"),
        (TimeDropped(lambda x: x + "a"), "unsupported operand|must be Tensor"),
        (lambda t: -t, "takes 1 positional argument but 2 were given"),
    ],
)
def test_a_type_error_of_ones_own_code_stays_what_it_is(field, message):
    with pytest.raises(TypeError, match=message):
        Exact()(field, 0.0, X)


def test_one_sample_without_a_batch_is_told_how_to_be_one():
    with pytest.raises(FieldError, match=r"mixes the samples.*one sample, use x\.unsqueeze\(0\)"):
        divergence(lambda t, x: x.roll(1) * x, 0.0, X[0])


BAD_ARGUMENTS = {
    "integer x": (0.0, torch.ones(4, 3, dtype=torch.long), r"torch\.int64.*x\.float\(\)"),
    "complex x": (0.0, torch.ones(4, 3, dtype=torch.complex64), "complex64"),
    "x without a batch": (0.0, torch.tensor(1.0), r"unsqueeze\(0\)"),
    "x no tensor": (0.0, [1.0, 2.0], "list.*as_tensor"),
    "t of a wrong shape": (torch.zeros(3), X, r"\(3,\)\. Give as many times as samples\."),
    "t as a column": (torch.zeros(4, 1), X, r"\(4, 1\)\. Use t\.reshape\(-1\)\."),
    "one t in a list": (torch.zeros(1), X, r"\(1,\)\. Use t\.reshape\(\(\)\)\."),
    "t no number": ("now", X, "str"),
    "t elsewhere": (torch.zeros(4, device="meta"), X, "meta.*cpu"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_bad_arguments(name, kind):
    t, x, message = BAD_ARGUMENTS[kind]
    with pytest.raises(FieldError, match=message):
        divergence(lambda t, x: x, t, x, ESTIMATORS[name])


def test_it_is_a_value_error_too():
    assert issubclass(FieldError, ValueError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exact("backward"), "auto.*forward.*reverse.*'backward'"),
        (lambda: Exact(chunk_size=0), "chunk_size.*0"),
        (lambda: Hutchinson(0), "num_probes.*0"),
        (lambda: Hutchinson(1.5), r"num_probes.*1\.5"),
        (lambda: Hutchinson(1, "normal"), "gaussian.*rademacher.*sphere.*'normal'"),
    ],
)
def test_options_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError):
        Exact(chunks=3)


def test_frozen_probes_know_their_batch():
    with pytest.raises(FieldError, match=r"\(4, 3\).*\(2, 3\).*Freeze"):
        Hutchinson().freeze(X)(lambda t, x: x, 0.0, X[:2])


def test_inference_tensor_inside_the_field():
    with torch.inference_mode():
        captured = torch.ones(4, 3)
        with pytest.raises(FieldError, match="Clone"):
            divergence(lambda t, x: x * captured, 0.0, X)


class _Attention(nn.Module):
    def forward(self, t, x):
        return torch.softmax(x @ x.T, dim=1) @ x


MIXING = {
    "batch norm": (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "1 is a BatchNorm1d.*eval mode"),
    "attention over the batch": (_Attention(), "dimension 0"),
    "detached batch statistics": (lambda t, x: x - x.mean(dim=0).detach(), "dimension 0"),
    "a hidden last layer of zeros": (None, "dimension 0"),
}


class _ZeroEnded(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, t, x):
        return self.last(torch.softmax(x @ x.T, dim=1) @ x)


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("batch", [1, 2, 33])
def test_check_field_finds_mixing(kind, batch):
    field, message = MIXING[kind]
    field = _ZeroEnded() if field is None else field
    call = field if not isinstance(field, nn.Sequential) else None
    if call is None:

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = field

            def forward(self, t, x):
                return self.layers(x)

        call = Wrapped()
        message = "layers." + message
    running = [buffer.clone() for buffer in call.buffers()] if isinstance(call, nn.Module) else []
    with pytest.raises(FieldError, match=message):
        check_field(call, 0.0, torch.randn(batch, 3))
    for before, after in zip(running, call.buffers() if isinstance(call, nn.Module) else [], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("event", [(), (3,), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_check_field_accepts_fields(event, batch):
    x = torch.randn(batch, *event)
    state = torch.get_rng_state()
    check_field(Network(event, torch.float32), 0.0, x)
    check_field(Network(event, torch.float32), torch.rand(batch), x)
    check_field(lambda t, x: torch.nn.functional.dropout(x), 0.0, x)
    torch.set_rng_state(state)
    check_field(lambda t, x: x, 0.0, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_in_eval_mode_is_a_field():
    layer = nn.BatchNorm1d(3).eval()
    check_field(lambda t, x: layer(x), 0.0, X)


def test_a_time_in_second_place_is_refused_though_the_call_would_work():
    """With a scalar and numbers of one dtype the value would be that of swapped arguments."""
    with pytest.raises(FieldError, match=r"takes \(x, t\). Swap them"):
        divergence(lambda x, t: -x * t, 0.5, torch.ones(2, 3))

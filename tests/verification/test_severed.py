"""Fields that cut themselves off from autograd: found, with the line, whatever the estimator; and right ones left alone."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from catalogue import KINDS
from torch import nn

from divflow.divergence import (
    Exact,
    FieldError,
    FieldWarning,
    Hutchinson,
    check_field,
    divergence,
)
from divflow.flow import ContinuousFlow
from divflow.operators import gradient, hessian, jacobian, laplacian
from divflow.verification import severed_fields
from divflow.verification.severed import Following


def point(dtype=torch.float64):
    return torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


def network(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).to(dtype)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Force(nn.Module):
    """Minus the gradient of |x|^2, with a graph in training mode only."""

    def forward(self, t, x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(-(z**2).sum(), z, create_graph=self.training)[0]


class OwnLeaf(nn.Module):
    """A force whose positions are a leaf of their own, as many a molecular network makes them."""

    def forward(self, t, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return torch.autograd.grad(-(z**4).sum(), z, create_graph=True)[0]


def geometry(share):
    net = network()

    def field(t, x):
        with torch.no_grad():
            r = x.norm(dim=1, keepdim=True)
        return net(x) + share * net(x) * r

    return field


def one_entry(t, x):
    y = x.sin()
    y[:, 0] = x[:, 0].detach() ** 2
    return y


def written_without_a_graph(t, x):
    y = x.sin()
    with torch.no_grad():
        y.mul_(3)
    return y


def through_numpy(t, x):
    return x * torch.from_numpy(x.detach().cpu().numpy() ** 2)


WRONG = {
    "no_grad": torch.no_grad()(lambda t, x: -2 * x),
    "detach": lambda t, x: x * x.detach(),
    "data": lambda t, x: x * x.data,
    "a force in evaluation": Force().eval(),
    "a leaf of its own": OwnLeaf(),
    "a geometry": geometry(1.0),
    "a hundredth": geometry(0.01),
    "a thousandth": geometry(0.001),
    "one entry": one_entry,
    "written without a graph": written_without_a_graph,
    "numpy": through_numpy,
    "a list": lambda t, x: x * torch.tensor(x.tolist(), dtype=x.dtype),
    "within vmap": lambda t, x: x + torch.func.vmap(lambda z: z.detach() * z)(x),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_cut_is_warned_of_once_and_is_an_error_of_flows_and_checks(name):
    field, x = WRONG[name], point()
    with pytest.warns(FieldWarning, match="autograd does not see all"):
        divergence(field, 0.0, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divergence(field, 0.0, x)
    for _ in range(3):  # at every call, not only at those that are verified
        with pytest.raises(FieldError, match="central differences"):
            ContinuousFlow(field, 6).log_prob(0.01 * x)
    with pytest.raises(FieldError, match="central differences"):
        check_field(field, 0.0, x)


def test_a_number_that_left_torch_is_found():
    def field(t, x):
        return torch.stack([row * row.abs().max().item() for row in x])

    with pytest.warns(FieldWarning, match="a number left torch by item in line"):
        divergence(field, 0.0, point())


@pytest.mark.parametrize("name", KINDS)
def test_every_estimator_finds_the_line(name):
    def field(t, x):
        return x * x.detach()

    line = rf"detach in line {field.__code__.co_firstlineno + 1} of test_severed\.py"
    with severed_fields("refuse"), pytest.raises(FieldError, match=line):
        divergence(field, 0.0, point(), KINDS[name])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_meant_is_let_be(name):
    field, x = WRONG[name], point()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divergence(field, 0.0, x, detached=True)
        check_field(field, 0.0, x, detached=True)
        ContinuousFlow(field, 6, detached=True).log_prob(0.01 * x)
        with severed_fields("allow"):
            Hutchinson(2)(field, 0.0, x)


OPERATORS = {
    "gradient": lambda x: gradient(lambda z: (z * z.detach()).sum(1), x),
    "jacobian": lambda x: jacobian(lambda t, z: z * z.detach(), 0.0, x),
    "hessian": lambda x: hessian(lambda z: (z**2 * z.detach()).sum(1), x),
    "laplacian": lambda x: laplacian(lambda z: (z**2 * z.detach()).sum(1), x),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_warn(name):
    with pytest.warns(FieldWarning, match="detach in line"):
        OPERATORS[name](point())


def neighbours(t, x):
    with torch.no_grad():
        nearest = torch.cdist(x[..., None], x[..., None]).topk(2).indices
    return x.sin() + x.gather(1, nearest[..., 0])


def stable_softmax(t, x):
    e = (x - x.amax(1, keepdim=True).detach()).exp()
    return e / e.sum(1, keepdim=True)


def written_into(t, x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1] ** 2
    return y


class Keeping(nn.Module):
    """A recurrent network that keeps its state, and shifts by a detached maximum."""

    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.GRUCell(6, 6), None

    def forward(self, t, x):
        state = torch.zeros_like(x) if self.state is None else self.state
        shift = x.amax(1, keepdim=True).detach()
        value = self.cell((x - shift).exp() / (x - shift).exp().sum(1, keepdim=True), state)
        self.state = value.detach()
        return value


def right_fields(dtype):
    net = network(dtype)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)).to(dtype)
    gru = nn.GRU(6, 6, batch_first=True).to(dtype)
    script = torch.jit.script(net)
    return {
        "a network": lambda t, x: net(x),
        "a force with its graph": Force().train(),
        "neighbours": neighbours,
        "spectral norm": lambda t, x: spectral(x),
        "a GRU": lambda t, x: gru(x[:, None])[0][:, 0],
        "dropout": lambda t, x: F.dropout(net(x), 0.5),
        "one hot": lambda t, x: F.one_hot(x.argmax(1), 6) * x,
        "sign": lambda t, x: x.sign(),
        "written into": written_into,
        "a branch": lambda t, x: -x if (x > 100).any() else net(x),
        "in place": lambda t, x: net(x).mul_(2).add_(x),
        "relu, at zero": lambda t, x: F.relu(x - x) + x,
        "steep": lambda t, x: torch.tanh(1e4 * x),
        "a stable softmax": stable_softmax,
        "a backward of its own": lambda t, x: Square.apply(x),
        "script": lambda t, x: script(x),
        "constant": lambda t, x: torch.ones_like(x),
        "torch.func": lambda t, x: torch.func.vmap(torch.func.grad(lambda z: -(z**2).sum()))(x),
        "a branch by a number": lambda t, x: net(x) if x.abs().max().item() > -1 else x,
        "a partial": functools.partial(lambda scale, t, x: scale * net(x), 2.0),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", right_fields(torch.float32))
def test_right_fields_are_left_alone(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="the field changes its own state", category=FieldWarning)
        field = right_fields(dtype)[name]
        for _ in range(4):
            divergence(field, 0.0, point(dtype), Hutchinson(2))
            check_field(field, 0.0, point(dtype))
        if name not in ("sign", "steep", "dropout"):  # which no solver follows
            ContinuousFlow(field, 6).log_prob(0.1 * point(dtype))


def test_a_suspect_field_that_keeps_a_state_is_compared_in_that_state():
    field = Keeping()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            divergence(field, 0.0, point(torch.float32), Hutchinson())
    assert field.state is not None


def test_where_its_state_can_not_be_set_back_it_is_not_compared_and_explain_says_so():
    counts = iter(range(1000))

    def field(t, x):
        return stable_softmax(t, x) * (1 + next(counts))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = Exact().explain(field, 0.0, point(torch.float32))
    assert "not compared with differences" in plan.why
    assert "keeps a state" in plan.why


def test_comparing_leaves_no_trace():
    """Nothing that a field holds is changed by it, no random number drawn."""
    calls, generator = [], torch.Generator().manual_seed(0)
    norm = nn.BatchNorm1d(6).double().eval()

    def field(t, x):
        calls.append(torch.rand((), generator=generator))
        return norm(x) * x.detach()

    x, before, state = point(), norm.running_mean.clone(), torch.get_rng_state()
    with pytest.warns(FieldWarning):
        divergence(field, 0.0, x)
    assert len(calls) == 1
    assert torch.equal(
        generator.get_state(), torch.Generator().manual_seed(0).set_state(generator.get_state()).get_state()
    )
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_lambdas_over_new_tensors_are_followed_at_the_first_calls_of_their_code():
    """Each is another object over another tensor, and no field of its own."""
    net, followed = network(), []

    class Counted(nn.Module):
        def forward(self, x):
            followed.append(
                any(isinstance(m._listener, Following) for m in torch.overrides._get_current_function_mode_stack())
            )
            return net(x)

    counted = Counted()
    for call in range(1, 21):
        scale = torch.full((), float(call), dtype=torch.float64)
        divergence(lambda t, x, scale=scale: scale * counted(x), 0.0, point(), Hutchinson())
    assert [call for call, seen in enumerate(followed, 1) if seen] == [1, 2, 4, 8, 16]


def test_a_zero_last_layer_hides_no_cut():
    last = nn.Linear(6, 6).double()
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with pytest.warns(FieldWarning):
        divergence(lambda t, x: last(x * x.detach()), 0.0, point())


@pytest.mark.filterwarnings("ignore:quantized.*autograd kernel")
def test_in_float32_a_quantized_network_is_found_by_differences_alone():
    """Which can't be converted: nothing of it is seen by autograd, which a difference of two digits tells, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(network(torch.float32), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(FieldError, match="central differences and 0 by autograd"):
        ContinuousFlow(lambda t, x: net(x), 6).log_prob(point(torch.float32))


class Cubed(torch.autograd.Function):
    """A backward pass of its own, which is right."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def test_a_derivative_below_the_rounding_of_what_cancels_is_no_cut():
    """Saturated, and summed to nothing: differences are zero, and autograd's derivative is 1e-14."""
    x = torch.tensor([[17.0, -17.0, 18.0, -18.0]], dtype=torch.float64).sign() * 17 ** (1 / 3)
    for scale in (1.0, 1.02):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient(lambda z: Cubed.apply(z).tanh().sum(dim=1), scale * x)

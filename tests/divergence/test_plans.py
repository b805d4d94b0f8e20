"""How an exact divergence is chosen: once for a field, for reasons that are reported, and what is kept of it."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from divflow.divergence import Autograd, Exact, Plan, divergence, shared_products
from divflow.divergence.exact.layered import contract
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented
from divflow.networks import MLP, ConcatSquash
from divflow.tape.elementwise import FORMULAS, Formula
from divflow.verification.kept import Plans

X = torch.randn(4, 3)


def test_explain_says_what_a_call_does():
    plan = Exact().explain(lambda t, x: x * t, 0.5, X)
    assert isinstance(plan, Plan)
    assert (plan.method, plan.products) == ("layered", 0)
    plan = Exact(chunk_size=2).explain(lambda t, x: x.sort(dim=1).values, 0.0, X)
    assert (plan.method, plan.products, plan.chunk_size) == ("reverse", 3, 2)
    assert "sort has no rule" in plan.why
    assert plan.cost_in_forward_passes == 4
    assert plan.cost_in_probes == 2
    assert plan.memory > 0
    assert Exact("forward").explain(lambda t, x: x, 0.0, X).method == "forward"
    assert Exact("reverse").explain(lambda t, x: x, 0.0, X).why == "asked for"


NET = nn.Identity()


def through_a_helper(x):
    return NET(x)


def of_globals(t, x):
    return through_a_helper(x) * t


def test_a_function_of_a_global_network_is_planned_anew_where_that_is_another(monkeypatch):
    class Sorted(nn.Module):
        def forward(self, x):
            return x.sort(dim=1).values

    for net, method in ((nn.Linear(3, 3), "layered"), (Sorted(), "reverse"), (nn.Tanh(), "layered")):
        monkeypatch.setitem(globals(), "NET", net)
        for _ in range(3):
            torch.testing.assert_close(divergence(of_globals, 0.5, X), divergence(of_globals, 0.5, X, Autograd()))
        assert Exact().explain(of_globals, 0.5, X).method == method


def test_memory_of_the_layered_method_does_not_depend_on_the_dimension():
    memory = []
    for size in (100, 1000):
        net = MLP(size, (32, 32))
        memory.append(Exact().explain(net, 0.0, torch.randn(8, size)).memory)
    assert memory[1] < 10 * memory[0]
    assert memory[1] < 1000 * 1000 * 4


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t, x):
        return self.layers(x) * t


@pytest.mark.parametrize(
    "make",
    [
        lambda net: net,
        lambda net: lambda t, x: net(t, x),
        lambda net: functools.partial(lambda scale, t, x: scale * net(t, x), 2.0),
        lambda net: net.forward,
    ],
    ids=["module", "lambda", "partial", "method"],
)
def test_chosen_once_whatever_the_field_is_made_of(make):
    """Later calls evaluate the field once, and so does the first where the layered method applies."""
    net, calls = Network(), []
    net.layers.register_forward_hook(lambda *_: calls.append(1))
    for count in (1, 2, 3):
        divergence(make(net), 0.0, X)  # made anew each time
        assert len(calls) == count
    Exact().explain(make(net), 0.0, X)
    assert len(calls) == 3


def test_explain_uses_up_nothing_random():
    net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    state = torch.get_rng_state()
    Exact().explain(lambda t, x: net(x), 0.0, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_fields_are_not_kept_alive():

    def evaluated():
        net, big = MLP(3, (8, 8)), torch.zeros(3)
        divergence(lambda t, x: net(t, x) + big, 0.0, X)
        return weakref.ref(net), weakref.ref(net.layers[0].weight), weakref.ref(big)

    references = evaluated()
    gc.collect()
    assert all(reference() is None for reference in references)


def test_plans_forget_the_oldest_and_the_dead():
    plans, fields = Plans(size=2), [nn.Linear(1, 1) for _ in range(3)]
    for i, field in enumerate(fields):
        plans.keep(i, field, "here")
    assert [plans.get(field, "here") for field in fields] == [None, 1, 2]
    assert plans.get(fields[1], "elsewhere") is None
    fields[1].eval()
    assert plans.get(fields[1], "here") is None
    assert Plans().get(lambda t, x: x) is None


def wrong(u, y):
    return 2 - y * y


def test_a_wrong_derivative_is_found_behind_a_layer_of_zeros(monkeypatch):
    """The Jacobian of the whole field is zero then, whatever the rules say."""
    net = MLP(3, (8, 8), zero_init=True)
    monkeypatch.setitem(FORMULAS, "tanh", Formula(wrong))
    plan = Exact().explain(net, 0.0, X)
    assert plan.method == "reverse"
    assert "the derivative of tanh differs" in plan.why


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_what_was_verified_is_verified_again(monkeypatch, mode):
    """At calls 2, 4, 8, ...: a fault that shows up later lasts no longer than the field has lived."""
    net = MLP(3, (8, 8))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    true = divergence(net, 0.0, X, Autograd()).detach()
    with mode():
        for _ in range(1, 4):
            torch.testing.assert_close(divergence(net, 0.0, X).detach(), true)
            assert Exact().explain(net, 0.0, X).method == "layered"
        monkeypatch.setitem(FORMULAS, "tanh", Formula(wrong))
        for _ in range(4, 7):
            torch.testing.assert_close(divergence(net, 0.0, X).detach(), true)
            assert Exact().explain(net, 0.0, X).method == "reverse"


def test_a_field_that_never_does_the_same_is_not_planned_for_ever():
    conv = nn.Conv1d(1, 1, 3, padding=1)

    def zoomed(t, x):
        wider = torch.nn.functional.interpolate(x[:, None], scale_factor=1 + t.item(), mode="linear")
        return conv(wider)[:, 0, :16] * x

    x, methods = torch.randn(2, 16), []
    for i in range(1, 21):
        t = torch.tensor(i / 1000)
        torch.testing.assert_close(divergence(zoomed, t, x), divergence(zoomed, t, x, Autograd()))
        methods.append(Exact().explain(zoomed, t, x).method)
    # A plan at the first call, and after each surprise, until there are eight.
    assert methods == ["colored"] * 15 + ["reverse"] * 5
    assert "operations differ at every call" in Exact().explain(zoomed, t, x).why


def test_a_first_point_at_which_nothing_can_be_verified_decides_nothing():
    net = MLP(3, (8, 8))
    assert divergence(net, 0.0, X * torch.nan).isnan().all()
    assert Exact().explain(net, 0.0, X).method == "layered"


def test_products_of_parameters_are_taken_once_a_solve(monkeypatch):
    """Whatever the number of nodes or evaluations, and with the gradient of the sum of them all."""
    taken = []
    form = contract._bilinear_form
    monkeypatch.setattr(contract, "_bilinear_form", lambda *arguments: taken.append(1) or form(*arguments))
    net = MLP(3, (8, 8)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    flow = ContinuousFlow(net, 3, likelihood=Augmented())
    flow.log_prob(x[:1]).sum().backward()  # makes the plans
    flow.log_prob(x)
    net.zero_grad()
    taken.clear()
    result = flow.evaluate(x)
    assert result.evaluations.forward > 5
    assert len(taken) == 1
    result.log_prob.sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    flow.replace(estimator=Exact("reverse")).log_prob(x).sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    # A later solve takes them anew: the parameters may have changed, and the graph is gone.
    flow.log_prob(x).sum().backward()
    assert len(taken) == 2


def test_shared_products_notice_a_changed_parameter():
    net = MLP(3, (8, 8)).double()
    x = X.double()
    with shared_products(), torch.no_grad():
        before = divergence(net, 0.0, x)
        net.layers[0].weight.mul_(2)
        after = divergence(net, 0.0, x)
    torch.testing.assert_close(after, divergence(net, 0.0, x, Exact("reverse")).detach())
    assert (after - before).abs().max() > 1e-3


def test_gates_that_a_scalar_time_shares_are_evaluated_time_by_time():
    """Quadrature chooses per field: FFJORD's gates are folded into the matrices, a plain network takes one batch."""
    x = torch.randn(64, 20)
    gated, plain = ConcatSquash(20, (32, 32)), MLP(20, (32, 32))
    t = torch.tensor(0.3)
    assert Exact().prefers_one_time(gated, t, x)
    assert not Exact().prefers_one_time(plain, t, x)
    shapes = []
    gated.layers[0].register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[0]))
    flow = ContinuousFlow(gated, 20)
    flow.log_prob(x)
    shapes.clear()
    exact = flow.log_prob(x)
    assert set(shapes) == {64}
    together = flow.replace(estimator=Exact("reverse")).log_prob(x)
    torch.testing.assert_close(exact, together, rtol=1e-5, atol=1e-5)

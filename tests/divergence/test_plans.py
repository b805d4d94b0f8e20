"""How an exact divergence is chosen: once for a field, for reasons that are told, and what is kept of it."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from divflow.divergence import Exact, Plan, divergence, shared_products
from divflow.divergence.layered import contract
from divflow.divergence.plan import Plans
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented
from divflow.networks import MLP, ConcatSquash

X = torch.randn(4, 3)


def test_explain_says_what_a_call_does():
    plan = Exact().explain(lambda t, x: x * t, 0.5, X)
    assert isinstance(plan, Plan)
    assert (plan.method, plan.products) == ("layered", 0)
    plan = Exact(chunk_size=2).explain(lambda t, x: x.softmax(dim=1), 0.0, X)
    assert (plan.method, plan.products, plan.chunk_size) == ("reverse", 3, 2)
    assert "softmax has no rule" in plan.why
    assert plan.cost_in_forward_passes == 4
    assert plan.cost_in_probes == 2
    assert plan.memory > 0
    assert Exact("forward").explain(lambda t, x: x, 0.0, X).method == "forward"
    assert Exact("reverse").explain(lambda t, x: x, 0.0, X).why == "asked for"


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

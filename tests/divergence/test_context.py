"""What a field is given beside time and state: any tree of tensors, by which plans are kept, not by its numbers."""

import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

from divflow.divergence import (
    Autograd,
    Exact,
    FieldError,
    FieldWarning,
    Hutchinson,
    check_field,
    divergence,
    value_and_divergence,
)
from divflow.flow import ContinuousFlow
from divflow.operators import jacobian

Given = namedtuple("Given", "label scale")
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Field(nn.Module):
    """g = rate[label] * scale * sin(x) + mask * x W, of which everything is known in closed form."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.W = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, t, x, context):
        given, (mask,) = context["given"], context["more"]
        assert given.label.dtype == torch.int64
        assert mask.dtype == torch.bool
        return (self.rate[given.label] * given.scale)[:, None] * torch.sin(x) + mask[:, None] * (x @ self.W)

    def truth(self, x, context):
        given, (mask,) = context["given"], context["more"]
        return self.rate[given.label] * given.scale * x.cos().sum(dim=1) + mask * self.W.trace()


def tree(seed=0, rows=6, grad=False):
    noise = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, generator=noise, dtype=torch.float64).requires_grad_(grad)
    label, mask = torch.randint(0, 3, (rows,), generator=noise), torch.rand(rows, generator=noise) < 0.5
    return {"given": Given(label, scale), "more": [mask]}


@pytest.mark.parametrize("estimator", [Exact(), Exact("reverse"), Exact("forward"), Autograd()], ids=str)
def test_the_divergence_and_its_gradients_in_the_tensors_of_a_tree(estimator):
    field, context = Field(), tree(grad=True)
    value, found = value_and_divergence(field, 0.3, X, estimator, context=context)
    torch.testing.assert_close(value, field(0.3, X, context))
    torch.testing.assert_close(found, field.truth(X, context))
    inputs = [context["given"].scale, field.rate]
    true = torch.autograd.grad(field.truth(X, context).square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), true)


def test_estimates_and_jacobians_take_it_too():
    field, context = Field(), tree()
    many = divergence(field, 0.3, X, Hutchinson(4000), context=context)
    assert (many - field.truth(X, context)).abs().max() < 0.3
    traces = jacobian(field, 0.3, X, context=context).diagonal(dim1=1, dim2=2).sum(dim=1)
    torch.testing.assert_close(traces, field.truth(X, context))


def test_a_context_need_not_be_of_rows():
    def field(t, x, context):
        return x @ context["matrix"]

    matrix = torch.randn(3, 3, dtype=torch.float64)
    for batch in (X, X[:3], X[:1]):  # of three rows it could be taken for one a sample
        found = divergence(field, 0.0, batch, context={"matrix": matrix})
        torch.testing.assert_close(found, matrix.trace().expand(len(batch)))
        check_field(field, 0.0, batch, gradient=True, context={"matrix": matrix})


class Own(Field):
    """It knows its own divergence, which is verified on a few rows."""

    def value_and_divergence(self, t, x, context):
        return self(t, x, context), self.truth(x, context)


def test_an_own_divergence_is_given_the_context():
    field, context = Own(), tree()
    assert Exact().explain(field, 0.3, X, context=context).method == "own"
    torch.testing.assert_close(divergence(field, 0.3, X, context=context), field.truth(X, context))
    field.truth = lambda x, context: 2 * Field.truth(field, x, context)
    other = Own()
    other.truth = field.truth
    with pytest.raises(FieldError, match="own divergence of Own is wrong"):
        divergence(other, 0.3, X, context=context)


class Shared(nn.Module):
    """It knows its own divergence, given a matrix for the whole batch and a scale for each row: all rows are verified together."""

    def forward(self, t, x, context):
        return context["scale"][:, None] * (x @ context["matrix"])

    def value_and_divergence(self, t, x, context):
        return self(t, x, context), context["scale"] * context["matrix"].trace()


def test_an_own_divergence_is_given_what_is_shared():
    context = {"scale": torch.rand(6, dtype=torch.float64), "matrix": torch.randn(3, 3, dtype=torch.float64)}
    found = divergence(Shared(), 0.0, X, context=context)
    torch.testing.assert_close(found, context["scale"] * context["matrix"].trace())
    check_field(Shared(), 0.0, X, gradient=True, context=context)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_field_is_checked_with_its_context(rows):
    check_field(Field(), 0.3, X[:rows], gradient=True, context=tree(rows=rows))
    with pytest.raises(FieldError, match="mixes the samples"):
        check_field(lambda t, x, c: x - c["a"].mean() * x.mean(dim=0), 0.0, X, context={"a": torch.ones(6)})


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, t, x, c):
        return self.net(torch.cat([x, c], dim=1))


def test_other_numbers_are_no_other_field():
    """A closure over them is coloured anew at each call, by many products; with a context the field is evaluated once."""
    net, x, calls = Convolved(), torch.randn(2, 1, 8, 8), []
    net.net.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        c = torch.randn(2, 1, 8, 8)
        found = divergence(net, 0.0, x, context=c)
        torch.testing.assert_close(found, divergence(net, 0.0, x, Autograd(), context=c), rtol=1e-4, atol=1e-4)
    calls.clear()
    divergence(net, 0.0, x, context=torch.randn(2, 1, 8, 8))
    assert len(calls) == 1
    assert Exact().explain(net, 0.0, x, context=torch.randn(2, 1, 8, 8)).method == "colored"


def test_closures_over_a_batch_are_warned_of_once_and_contexts_are_not():
    net = nn.Linear(5, 3).double()

    def step(context):
        c = torch.randn(6, 2, dtype=torch.float64)
        if context:
            return divergence(lambda t, x, c: net(torch.cat([x, c], dim=1)), 0.0, X, context=c)
        return divergence(lambda t, x: net(torch.cat([x, c], dim=1)), 0.0, X)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            step(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            step(False)
    (once,) = caught
    assert once.category is FieldWarning
    assert "planned anew at each call" in str(once.message)
    assert "context=c" in str(once.message)


def test_what_is_no_tree_of_tensors_is_refused_by_its_path():
    with pytest.raises(FieldError, match=r"the context\['more'\]\[0\] is 3"):
        divergence(Field(), 0.0, X, context={"given": torch.ones(6), "more": [3]})


def test_a_flow_over_a_closure_reports_its_nodes_and_the_context():
    c = torch.randn(6, 2, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def velocity(t, x, c=c):
        return net(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1), c], dim=1))

    with pytest.raises(FieldError, match=r"15 nodes as one batch, \(90, 3\).*of one, \(6, 3\).*context"):
        ContinuousFlow(lambda t, x: velocity(t, x), 3).log_prob(X)
    assert ContinuousFlow(velocity, 3).log_prob(X, c).isfinite().all()

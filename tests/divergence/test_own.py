"""Fields that know their own divergence: it is used, and believed only as far as autograd agrees."""

import pytest
import torch
from catalogue import EVENTS
from own_laws import derivatives
from torch import nn

from divflow.divergence import Autograd, Exact, FieldError, Hutchinson, divergence, value_and_divergence
from divflow.flow import ContinuousFlow
from divflow.networks import MLP
from divflow.score import ScaledScore, VarianceExploding, VariancePreserving, probability_flow
from divflow.score.field import AtTime
from divflow.score.probability_flow import ProbabilityFlow


class Cubic(nn.Module):
    """a t x^3 + b roll(x), whose divergence is 3 a t |x|^2, plus b where there is but one entry."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=dtype)) for v in (0.7, 0.3))
        self.asked = 0

    def forward(self, t, x, context=None):
        time = t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
        value = self.a * time * x**3 + self.b * x.flatten(1).roll(1, dims=1).view_as(x) if x.ndim > 1 else x**3
        return value if context is None else value * context.view(-1, *[1] * (x.ndim - 1))

    def value_and_divergence(self, t, x, context=None):
        self.asked += 1
        squares = x.reshape(len(x), -1).square()
        divergence = 3 * self.a * t * squares.sum(1) + self.b * (squares.shape[1] == 1)
        if x.ndim == 1:
            divergence = 3 * squares[:, 0]
        return self(t, x, context), divergence if context is None else divergence * context


class Wrong(Cubic):
    """A field whose own divergence is spoilt by a function."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def value_and_divergence(self, t, x, context=None):
        return self.spoil(*super().value_and_divergence(t, x, context))


def point(*event, k=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(k, *event, dtype=torch.float64, generator=generator)


def assert_equal(actual, expected, rtol=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize(
    "t", [torch.tensor(0.4, dtype=torch.float64), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)]
)
def test_it_is_used_and_differentiable(event, t):
    g, x = Cubic(), point(*event)
    assert_equal(derivatives(g, t, x, Exact()), derivatives(g, t, x, Autograd()))
    assert g.asked == 2  # to verify, and for the result
    assert Exact().explain(g, t, x).method == Exact("own").explain(g, t, x).method == "own"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_modes(dtype):
    g, x = Cubic(dtype), point(3).to(dtype)
    expected = 3 * 0.7 * 0.5 * x.double().square().sum(1)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = value_and_divergence(g, 0.5, x)
        assert found.divergence.dtype == torch.promote_types(dtype, torch.float32)
        assert found.divergence.requires_grad == (mode is torch.enable_grad)
        torch.testing.assert_close(found.divergence.detach().double(), expected, rtol=0.02, atol=0.02)
    assert divergence(g, 0.5, x[:0]).shape == (0,)


def test_any_object_may_offer_it_and_none_means_none():
    class Negative:
        def __call__(self, t, x):
            return -x

        def value_and_divergence(self, t, x):
            return -x, x.new_full(x.shape[:1], -3.0)

    class Without(Cubic):
        value_and_divergence = None

    assert Exact().explain(Negative(), 0.0, point(3)).method == "own"
    assert divergence(Negative(), 0.0, point(3)).tolist() == [-3.0] * 4
    assert Exact().explain(Without(), 0.0, point(3)).method == "layered"
    for method in ("reverse", "forward", "layered"):
        asked = Cubic()
        assert_equal([divergence(asked, 0.5, point(3), Exact(method))], [divergence(Without(), 0.5, point(3))])
        assert not asked.asked


@pytest.mark.parametrize("g", [MLP(3).double(), lambda t, x: x, Cubic().forward])
def test_to_ask_for_what_there_is_not_is_an_error(g):
    for call in (Exact("own"), Exact("own").explain):
        with pytest.raises(FieldError, match=r"value_and_divergence\(t, x\).*has none.*'auto'"):
            call(g, 0.5, point(3))


SPOILT = {
    "another divergence": (lambda v, d: (v, d + 1), r"Wrong is wrong: of the divergence.*gives [\d.]+ where autograd finds"),
    "of one sample": (lambda v, d: (v, d + torch.arange(len(d)) * 1e-3), "of the divergence"),
    "another value": (lambda v, d: (v * 1.1, d), "of the value,"),
    "a mean over samples": (lambda v, d: (v, d.mean().expand_as(d)), "of the divergence"),
    "a detached divergence": (lambda v, d: (v, d.detach()), "of the divergence's gradient in x"),
    "a detached value": (lambda v, d: (v.detach(), d), "of the value's gradient in x"),
    "one number": (lambda v, d: (v, d.sum()), r"of shape \(4,\) on cpu.*\(\). Sum over all event"),
    "no divergence": (lambda v, d: v, r"two tensors, of shapes \(4, 3\) and \(4,\).*Tensor"),
    "another shape": (lambda v, d: (v[:, :2], d), r"returned shape \(4, 2\)"),
    "another dtype": (lambda v, d: (v.float(), d), "returned torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_wrong_one_is_refused_at_every_call(kind):
    spoil, message = SPOILT[kind]
    g = Wrong(spoil)
    for _ in range(3):
        with pytest.raises(FieldError, match=message):
            divergence(g, torch.tensor(0.5, dtype=torch.float64), point(3))


def test_a_parameter_that_is_left_out_of_the_graph_is_named():
    class Detached(Cubic):
        def value_and_divergence(self, t, x):
            return self(t, x), 3 * self.a.detach() * t * x.square().sum(1)

    with pytest.raises(FieldError, match=r"gradient in a parameter of shape \(\).*gives 0 where"):
        divergence(Detached(), 0.5, point(3))
    with torch.no_grad():  # where nothing is lost by it
        divergence(Detached(), 0.5, point(3))


def test_one_that_becomes_wrong_is_found():
    g = Wrong(lambda value, divergence: (value, divergence))
    for _ in range(5):
        divergence(g, 0.5, point(3))
    g.spoil = lambda value, divergence: (value, 2 * divergence)
    divergence(g, 0.5, point(3))
    divergence(g, 0.5, point(3))
    with pytest.raises(FieldError, match="of the divergence"):  # the eighth
        divergence(g, 0.5, point(3))


@pytest.mark.parametrize("wrong", [1.0, 1.2])
def test_of_many_dimensions_an_estimate_is_compared(wrong):
    g = Wrong(lambda value, divergence: (value, wrong * divergence))
    if wrong == 1:
        divergence(g, 0.5, point(5000))
    else:
        with pytest.raises(FieldError, match="of the divergence"):
            divergence(g, 0.5, point(5000))


def test_random_numbers_are_drawn_as_without_it():
    class Noisy(Cubic):
        def forward(self, t, x):
            return super().forward(t, x) * torch.rand(()).double()

        def value_and_divergence(self, t, x):
            value, divergence = super().value_and_divergence(t, x)
            return value, divergence

    class Known(Noisy):
        def value_and_divergence(self, t, x):
            state = torch.get_rng_state()
            factor = torch.rand(()).double()
            torch.set_rng_state(state)
            return self(t, x), factor * 3 * self.a * t * x.square().sum(1)

    torch.manual_seed(3)
    first = value_and_divergence(Known(), 0.5, point(3))
    torch.manual_seed(3)
    expected = value_and_divergence(Known(), 0.5, point(3), Autograd())
    assert_equal(first, expected)


def test_estimates_of_such_a_field_are_those_of_any():
    g, x = Cubic(), point(3)
    found = divergence(g, 0.5, x, Hutchinson().freeze(x, torch.Generator().manual_seed(0)))
    other = divergence(lambda t, x: g(t, x), 0.5, x, Hutchinson().freeze(x, torch.Generator().manual_seed(0)))
    assert_equal([found], [other])
    assert not g.asked


def test_cost_is_counted():
    class Linear(nn.Module):
        """W x, its divergence known at the cost of three more of the same."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, t, x):
            return x @ self.weight

        def value_and_divergence(self, t, x):
            total = self.weight.trace().expand(len(x)) + sum(0 * (x @ self.weight).sum(1) for _ in range(3))
            return self(t, x), total

    plan = Exact().explain(Linear(), 0.0, torch.randn(32, 64))
    assert plan.cost_in_forward_passes == pytest.approx(4, rel=0.1)
    assert "Linear.value_and_divergence" in plan.why


@pytest.mark.parametrize("context", [None, torch.linspace(0.5, 1.5, 4, dtype=torch.float64)])
@pytest.mark.parametrize("graph", [True, False])
def test_in_a_flow(context, graph):
    g, x = Cubic(), 0.5 * point(3)
    own, reference = (ContinuousFlow(g, 3, estimator=e).double() for e in (Exact(), Autograd()))
    with torch.set_grad_enabled(graph):
        asked = g.asked
        found, expected = own.log_prob(x, context), reference.log_prob(x, context)
        assert g.asked > asked
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert Exact().explain(own.field(context), 0.3, x).method == "own"
    if graph:
        assert_equal(*(torch.autograd.grad(p.sum(), list(g.parameters())) for p in (found, expected)))


@pytest.mark.parametrize("data_std", [None, 1.5])
@pytest.mark.parametrize("t", [torch.tensor(0.4), torch.tensor([0.2, 0.4, 0.6, 0.9])])
@pytest.mark.parametrize("sde", [VariancePreserving, VarianceExploding])
def test_in_a_score(sde, t, data_std):
    sde, x = sde(event_shape=3), point(3)
    score = ScaledScore(Cubic(), sde, data_std)
    for field in (score, AtTime(score, 0.3), ProbabilityFlow(score, sde)):
        assert Exact().explain(field, t.double(), x).method == "own"
        ways = (derivatives(field, t.double(), x, way) for way in (Exact(), Autograd()))
        assert_equal(*ways, rtol=1e-8)  # at variances of 50^2
    plain = ProbabilityFlow(ScaledScore(lambda x: -x, sde, data_std), sde)
    assert Exact().explain(plain, t.double(), x).method == "layered"


def test_in_a_probability_flow():
    class Normal(nn.Module):
        """The score of a standard normal, at all times."""

        def forward(self, t, x):
            return -x

        def value_and_divergence(self, t, x):
            return -x, x.new_full(x.shape[:1], -2.0)

    flow = probability_flow(Normal(), VariancePreserving(event_shape=2)).double()
    x = point(2)
    expected = -x.square().sum(1) / 2 - torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-3)  # which alpha(T) is not zero by

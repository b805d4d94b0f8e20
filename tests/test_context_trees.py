"""Flows given trees of tensors: labels, masks and features of one row a sample, in every way that a flow is used."""

import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from divflow.divergence import FieldError
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine
from divflow.likelihood import Augmented
from divflow.matching import ConditionalFlowMatching, OptimalTransportCoupling
from divflow.solver import Solver

Pose = namedtuple("Pose", "scale")


class Shrink(nn.Module):
    """v = -a x with a = rate[label] * scale, or zero where masked: x = exp(-a) z, and log p(x) = log N(exp(a) x) + 2 a."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.2, -0.3, 0.5], dtype=dtype))

    def exponent(self, context):
        assert context["label"].dtype == torch.int64
        assert context["masked"].dtype == torch.bool
        a = self.rate[context["label"]] * context["pose"].scale
        return torch.where(context["masked"], 0.0, a)

    def forward(self, t, x, context):
        assert context["pose"].scale.dtype == x.dtype
        return -self.exponent(context)[:, None] * x

    def truth(self, x, context):
        a = self.exponent(context)
        return -(x * a.exp()[:, None]).square().sum(dim=1) / 2 - math.log(2 * math.pi) + 2 * a


def tree(rows=5, grad=False, dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)
    scale = (torch.rand(rows, generator=noise, dtype=dtype) + 0.5).requires_grad_(grad)
    return {
        "label": torch.randint(0, 3, (rows,), generator=noise),
        "masked": torch.arange(rows) % 4 == 3,
        "pose": Pose(scale),
    }


X = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TIGHT = Solver("dopri5", rtol=1e-8, atol=1e-8)
WAYS = {
    "direct": {"solver": TIGHT},
    "adjoint": {"solver": Solver("dopri5", rtol=1e-8, atol=1e-8, gradient="adjoint")},
    "augmented adjoint": {
        "solver": Solver("dopri5", rtol=1e-8, atol=1e-8, gradient="adjoint"),
        "likelihood": Augmented(),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_log_densities_and_gradients_in_features_and_parameters(way):
    velocity, context = Shrink(), tree(grad=True)
    flow = ContinuousFlow(velocity, 2, **WAYS[way])
    found, inputs = flow.log_prob(X, context), [context["pose"].scale, velocity.rate]
    torch.testing.assert_close(found, velocity.truth(X, context), rtol=1e-6, atol=1e-6)
    true = torch.autograd.grad(velocity.truth(X, context).square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), true, rtol=1e-5, atol=1e-5)


def test_a_parameter_that_is_a_context_is_differentiated_once():
    velocity, scale = Shrink(), nn.Parameter(torch.full((5,), 0.7, dtype=torch.float64))
    flow = ContinuousFlow(velocity, 2, **WAYS["adjoint"])
    context = tree() | {"pose": Pose(scale)}
    (true,) = torch.autograd.grad(velocity.truth(X, context).sum(), scale)
    torch.testing.assert_close(
        torch.autograd.grad(flow.log_prob(X, context).sum(), scale)[0], true, rtol=1e-5, atol=1e-5
    )


def test_samples_and_weights_have_their_rows_context():
    velocity, context = Shrink(), tree()
    flow = ContinuousFlow(velocity, 2, solver=TIGHT)
    noise = torch.Generator().manual_seed(3)
    z = flow.sample_base(5, torch.Generator().manual_seed(3))
    samples = flow.sample(5, context, noise)
    torch.testing.assert_close(samples, z * (-velocity.exponent(context)).exp()[:, None].detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.encode(samples, context), z, rtol=1e-6, atol=1e-6)
    many = {name: (Pose(it.scale.repeat(40)) if name == "pose" else it.repeat(40)) for name, it in tree().items()}
    with torch.no_grad():
        found = flow.importance_weights(lambda x: -x.square().sum(dim=1) / 2, 200, noise, context=many, batch_size=70)
    assert abs(found.log_normalizer - math.log(2 * math.pi)) < 5 * found.standard_error
    with pytest.raises(ValueError, match=r"each of 7 samples.*the context\['label'\] has shape \(5,\)"):
        flow.importance_weights(lambda x: x[:, 0], 7, context=tree())


def test_a_distribution_has_the_batch_shape_of_all_tensors():
    velocity = Shrink()
    flow = ContinuousFlow(velocity, 2, solver=TIGHT)
    distribution = flow.distribution(tree(), context_dim=0)
    assert (distribution.batch_shape, distribution.event_shape) == ((5,), (2,))
    torch.testing.assert_close(distribution.log_prob(X), velocity.truth(X, tree()), rtol=1e-6, atol=1e-6)
    assert distribution.sample((3,)).shape == (3, 5, 2)
    assert distribution.expand((4, 5)).rsample_and_log_prob()[1].shape == (4, 5)
    wide = ContinuousFlow(lambda t, x, c: -x * c["a"] * c["b"][:, None], 2)
    dims = {"a": 1, "b": 0}
    both = {"a": torch.ones(3, 2), "b": torch.ones(3)}
    assert wide.distribution(both, dims).batch_shape == (3,)
    with pytest.raises(
        FieldError, match=r"one batch shape, but have the context\['a'\] \(3, 2\), the context\['b'\] \(3,\)"
    ):
        wide.distribution(both, 0)
    with pytest.raises(FieldError, match="a tree of numbers like the context"):
        wide.distribution(both, {"a": 1})
    with pytest.raises(ValueError, match=r"the context\['b'\] must be finite"):
        type(wide.distribution())(
            wide, {"a": torch.ones(3, 2), "b": torch.full((3,), math.nan)}, dims, validate_args=True
        )


def test_a_density_casts_features_and_leaves_labels_and_masks():
    velocity = Shrink(torch.float32)
    density = FlowDensity(ContinuousFlow(velocity, 2), Affine())
    found = density.log_prob(X, tree())  # of float64
    torch.testing.assert_close(found, velocity.truth(X.float(), density.flow_context(tree())), rtol=1e-4, atol=1e-4)
    assert density.sample(5, tree()).shape == (5, 2)
    standardized = FlowDensity(density.flow, Affine(), Affine(torch.zeros(2), torch.ones(2)))
    with pytest.raises(FieldError, match=r"tensor \(k, 2\).*standardizes.*is a dict.*leave context_transform out"):
        standardized.log_prob(X, tree())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pose": Pose(torch.ones(4))},
            r"the context\['pose'\]\.scale needs one row per sample, \(5, \.\.\.\), but has shape \(4,\)",
        ),
        ({"label": torch.tensor(1)}, r"the context\['label'\] needs one row per sample.*shape \(\)"),
        ({"label": [1, 2, 0, 0, 1]}, r"the context\['label'\]\[0\] is 1"),
    ],
)
def test_a_leaf_without_a_row_a_sample_is_named(change, message):
    flow = ContinuousFlow(Shrink(), 2)
    for call in (flow.log_prob, flow.encode, lambda x, context: flow.sample(5, context)):
        with pytest.raises(FieldError, match=message):
            call(X, tree() | change)
    with pytest.raises(FieldError, match=message):
        ConditionalFlowMatching()(Shrink(), X, context=tree() | change)


def test_rows_that_are_not_finite_are_named_by_their_leaf():
    context = tree() | {"pose": Pose(torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0], dtype=torch.float64))}
    with pytest.raises(FieldError, match=r"the context\['pose'\]\.scale must be finite.*row 2 of 5"):
        ContinuousFlow(Shrink(), 2).log_prob(X, context)


def test_noise_is_coupled_within_rows_alike_in_all_tensors_and_weights():
    """Else it would depend on the context, or be weighted by its datum's weight."""
    noise, data = torch.randn(40, 1), torch.randn(40, 1)
    label, mask = torch.arange(40) % 2, torch.arange(40) % 3 == 0
    paired = OptimalTransportCoupling()(noise, data, {"label": label, "mask": mask})
    for group in (2 * label + mask).unique():
        rows = 2 * label + mask == group
        assert torch.equal(paired[rows].sort(dim=0).values, noise[rows].sort(dim=0).values)
        assert torch.equal(paired[rows].argsort(dim=0), data[rows].argsort(dim=0))  # in one dimension the order
    seen = []

    class Watching(OptimalTransportCoupling):
        def __call__(self, noise, data, context=None):
            seen.append(super().__call__(noise, data, context))
            return seen[-1]

    weight = 1.0 + label
    ConditionalFlowMatching(coupling=Watching())(lambda t, x: 0 * x, data, noise=noise, weight=weight)
    for value in (1.0, 2.0):
        rows = weight == value
        assert torch.equal(seen[0][rows].sort(dim=0).values, noise[rows].sort(dim=0).values)

"""Densities of data in their own units: types, shapes and digits, at the door and back out."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Generator, nn
from torch.distributions import Normal

from divflow.divergence import FieldError
from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine, Bounded, Compose, Logit, MeanFreeScale
from divflow.flow.units import UnitsWarning
from divflow.score import ScoreDensity, UnnormalizedDensity, VariancePreserving, probability_flow
from divflow.score.sampling import AnnealedLangevin
from divflow.solver import SolverError


def still(t, x):
    return torch.zeros_like(x)


def shrinking(transform, event=3):
    """A flow of v = -x, whose density is N(0, exp(-2)), through a transform."""
    return FlowDensity(ContinuousFlow(lambda t, x: -x, event), transform)


DENSITIES = {
    "numbers": shrinking(Affine(1.0, 2.0)),
    "columns": shrinking(Affine([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])),
    "bounds": shrinking(Bounded([0.0] * 3, [1.0] * 3)),
    "logits": shrinking(Compose([Logit(), Affine([0.0] * 3, [1.0] * 3)])),
    "a score": ScoreDensity(probability_flow(lambda t, x: -x, VariancePreserving(event_shape=(3,))), Affine()),
}
each = pytest.mark.parametrize("name", DENSITIES)
WRONG = {
    "integers": (torch.tensor([[1, 2, 3]]), r"floating dtype, but has torch\.int64; convert it by x\.double\(\)"),
    "bytes": (torch.tensor([[1, 2, 3]], dtype=torch.uint8), r"torch\.uint8"),
    "booleans": (torch.tensor([[True, False, True]]), r"torch\.bool"),
    "complex numbers": (torch.ones(1, 3, dtype=torch.complex64), r"must be real.*view_as_real"),
    "a list": ([[0.1, 0.2, 0.3]], r"is a list; use torch\.as_tensor"),
    "an array": (np.full((1, 3), 0.5), r"is a ndarray; use torch\.as_tensor"),
    "one sample": (
        torch.full((3,), 0.5),
        r"\(k, 3\), one row per sample, but has \(3,\); one sample is x\.unsqueeze\(0\)",
    ),
    "one column": (torch.full((2, 1), 0.5), r"\(k, 3\).*\(2, 1\)"),
    "another shape": (torch.full((2, 3, 1), 0.5), r"\(k, 3\).*\(2, 3, 1\)"),
    "a scalar": (torch.tensor(0.5), "is a scalar"),
    "NaN": (torch.tensor([[0.5] * 3, [0.5, math.nan, 0.5], [0.5] * 3]), r"finite, but is not in row 1 of 3"),
    "infinity": (torch.tensor([[0.5] * 3] * 20 + [[math.inf, 0.5, 0.5]] * 20), r"row 20, 21, .*29 and 10 more of 40"),
}


@each
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused_at_the_door(name, wrong):
    density, (x, message) = DENSITIES[name], WRONG[wrong]
    if (name, wrong) == ("bounds", "infinity"):
        assert density.log_prob(x).isneginf().tolist() == [False] * 20 + [True] * 20  # which is beyond a bound
    else:
        with pytest.raises(FieldError, match=message):
            density.log_prob(x)
    if name == "a score":
        with pytest.raises(FieldError, match=message):
            density.score(x)
    if wrong not in ("one sample", "one column", "another shape"):
        with pytest.raises(FieldError):
            density.transform(x)


@pytest.mark.parametrize("wrong", ["one sample", "one column"])
@pytest.mark.parametrize("name", ["columns", "bounds", "logits"])
def test_a_transform_of_columns_broadcasts_no_data(name, wrong):
    transform = DENSITIES[name].transform
    transform = transform.parts[1] if name == "logits" else transform
    with pytest.raises(FieldError, match=r"has shape \(3,\), so x must have shape \(k, 3\)"):
        transform(WRONG[wrong][0])
    with pytest.raises(FieldError, match=r"has shape \(3,\), so x must have shape \(k, 3\)"):
        transform.inverse(WRONG[wrong][0])


def test_particles_only():
    with pytest.raises(FieldError, match=r"particles \(k, n, d\)"):
        MeanFreeScale(2.0)(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_floating_dtypes_have_the_density_of_a_normal(dtype):
    x = torch.tensor([[1.0, 2.0, -4.0], [0.5, 9.0, 6.5]], dtype=dtype)
    shift, scale = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([3.0, 7.0, 0.5])
    truth = Normal(shift.double(), scale.double() * math.exp(-1)).log_prob(x.double()).sum(1)
    log_prob = shrinking(Affine(shift, scale)).log_prob(x)
    assert log_prob.dtype == torch.float32  # the model's own
    torch.testing.assert_close(log_prob.double(), truth, rtol=3e-4, atol=1e-3)


@pytest.mark.parametrize("function", ["log_prob", "encode"])
def test_a_flow_names_the_rows_that_are_not_finite(function):
    x = torch.zeros(4, 2)
    x[2, 0] = math.nan
    for velocity in (still, lambda t, x: -x):
        with pytest.raises(FieldError, match="x must be finite, but is not in row 2 of 4"):
            getattr(ContinuousFlow(velocity, 2), function)(x)
    context = torch.zeros(4, 1)
    context[[0, 3]] = math.inf
    flow = ContinuousFlow(lambda t, x, c: -x * c, 2)
    with pytest.raises(FieldError, match="the context must be finite, but is not in row 0, 3 of 4"):
        getattr(flow, function)(torch.zeros(4, 2), context)
    with pytest.raises(SolverError):
        getattr(ContinuousFlow(lambda t, x: x**2 * 1e30, 2), function)(torch.ones(4, 2))


def test_a_context_is_looked_at_as_data_are():
    conditional = FlowDensity(
        ContinuousFlow(lambda t, x, c: -x * c[:, :1], 2), Affine(), Affine([2.46e6, 0.0], [0.1, 1.0])
    )
    x, context = torch.zeros(2, 2), torch.tensor([[2.46e6, 0.0], [2.46e6 + 0.2, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(conditional.flow_context(context)[:, 0], torch.tensor([0.0, 2.0]), rtol=0, atol=1e-4)
    for wrong, message in (
        (context.long(), "int64"),
        (context[:, :1], r"\(k, 2\)"),
        (context.numpy(), "ndarray"),
        (context * math.nan, "the context must be finite, but is not in row 0, 1 of 2"),
    ):
        with pytest.raises(FieldError, match=message):
            conditional.log_prob(x, wrong)


def test_a_context_may_be_given_by_the_names_of_its_columns():
    """As the tensor of these columns in their order: a number for all rows, or one for each, whose gradients are those of the tensor."""
    flow = ContinuousFlow(lambda t, x, c: c[:, :1] - x * c[:, 1:], 2)
    density = FlowDensity(flow, Affine(), Affine([40.0, 170.0], [10.0, 5.0]))
    density.context_columns = ["age", "height"]
    x, heights = torch.randn(3, 2), torch.tensor([160.0, 170.0, 185.0], dtype=torch.float64, requires_grad=True)
    context = torch.stack([torch.full((3,), 41.0, dtype=torch.float64), heights], dim=1)
    expected = density.log_prob(x, context)
    for given in ({"height": heights, "age": 41}, {"age": np.full(3, 41), "height": heights.tolist()}):
        torch.testing.assert_close(density.log_prob(x, given), expected, rtol=0, atol=0)
    by_name, by_tensor = (
        torch.autograd.grad(density.log_prob(x, it).sum(), heights)[0]
        for it in ({"age": 41.0, "height": heights}, context)
    )
    torch.testing.assert_close(by_name, by_tensor)
    named = {"age": 41.0, "height": 170.0}
    draw, rows = (lambda: torch.Generator().manual_seed(0)), torch.tensor([[41.0, 170.0]]).expand(4, 2)
    assert torch.equal(density.sample(4, named, draw()), density.sample(4, rows, draw()))
    weights = [
        density.importance_weights(lambda x: -x.square().sum(dim=1), 4, draw(), context=it) for it in (named, rows)
    ]
    assert torch.equal(weights[0].log_weights, weights[1].log_weights)


def test_one_row_of_a_context_is_that_of_all_samples():
    flow = ContinuousFlow(lambda t, x, c: c[:, :1] - x * c[:, 1:], 2)
    density = FlowDensity(flow, Affine(), Affine([40.0, 170.0], [10.0, 5.0]))
    draw, row = (lambda: torch.Generator().manual_seed(0)), torch.tensor([[41.0, 170.0]])
    assert torch.equal(density.sample(3, row, draw()), density.sample(3, row.expand(3, 2), draw()))
    target = lambda x: -x.square().sum(dim=1)  # noqa: E731
    weights = [density.importance_weights(target, 3, draw(), context=it) for it in (row, row.expand(3, 2))]
    assert torch.equal(weights[0].log_weights, weights[1].log_weights)
    assert torch.equal(density.sample(2, row[0].unsqueeze(0), draw()), density.sample(2, row.expand(2, 2), draw()))
    with pytest.raises(FieldError, match=r"but is of shape \(2,\)\. For one row, use context.unsqueeze\(0\)\.$"):
        density.sample(2, row[0])
    of_one = FlowDensity(ContinuousFlow(lambda t, x, c: c - x, 1), Affine(), Affine([40.0], [10.0]))
    with pytest.raises(FieldError, match=r"is of shape \(3,\)\. For one number per sample, use context.unsqueeze\(1\)"):
        of_one.log_prob(torch.zeros(3, 1), torch.ones(3))


def test_a_missing_context_is_named():
    density = FlowDensity(ContinuousFlow(lambda t, x, c: c - x, 2), Affine(), Affine([40.0, 170.0], [10.0, 5.0]))
    with pytest.raises(FieldError, match=r"no context was given. Give a tensor \(3, 2\)\.$"):
        density.log_prob(torch.zeros(3, 2))
    density.context_columns = ["age", "height"]
    for call in (lambda: density.log_prob(torch.zeros(3, 2)), lambda: density.sample(3)):
        with pytest.raises(
            FieldError, match=r"Give a tensor \(3, 2\) of age, height, or a dict of numbers by these names"
        ):
            call()


def test_a_context_far_outside_of_the_training_is_warned_of():
    """Half of its range beyond it or more; without a known range, as in older checkpoints, nothing is."""
    density = FlowDensity(
        ContinuousFlow(lambda t, x, c: -x, 2), Affine(), Affine(torch.tensor([50.0, 170.0]), torch.tensor([9.0, 5.0]))
    )
    density.context_columns = ["age", "height"]
    x, far = torch.zeros(3, 2), torch.tensor([[30.0, 160.0], [410.0, 160.0], [120.0, 160.0]])
    density.log_prob(x, far)
    density.context_range = [[20.0, 150.0], [80.0, 190.0]]
    said = r"^age=410 lies outside the training data's 20 to 80\. The density there is extrapolated\.$"
    for call in (lambda: density.log_prob(x, far), lambda: density.sample(3, {"age": 410, "height": 160})):
        with pytest.warns(UnitsWarning, match=said):
            call()
    with pytest.warns(
        UnitsWarning, match="age=-11 lies .* 20 to 80; height=211 lies outside the training data's 150 to"
    ):
        density.with_flow(density.flow).log_prob(x[:1], {"age": -11, "height": 211})
    density.log_prob(x, {"age": [-9, 109, 50], "height": 200})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"age": 41.0}, "the context names age, but the columns of the context are age, height"),
        ({"age": 41.0, "hieght": 1.0, "height": 170.0}, "the context names age, hieght, height, but"),
        ({"age": "old", "height": 170.0}, r"context's age must be a number or \(3,\) of them, but is 'old'"),
        ({"age": torch.ones(3, 1), "height": 170.0}, r"context's age must be .* \(3,\), but has shape \(3, 1\)"),
        ({"age": torch.ones(4), "height": 170.0}, r"one number per sample, \(3,\), but has shape \(4,\)"),
        ({"age": math.nan, "height": 170.0}, "the context must be finite, but is not in row 0, 1, 2 of 3"),
    ],
)
def test_what_is_no_context_by_name(given, message):
    density = FlowDensity(ContinuousFlow(lambda t, x, c: c - x, 2), Affine(), Affine([40.0, 170.0], [10.0, 5.0]))
    with pytest.raises(FieldError, match="To give numbers by name, set context_columns"):
        density.log_prob(torch.zeros(3, 2), given)
    density.context_columns = ["age", "height"]
    with pytest.raises(FieldError, match=message):
        density.log_prob(torch.zeros(3, 2), given)


# Out of range --------------------------------------------------------------------------------------------------------


def test_a_density_says_its_range_and_refuses_digits_of_another():
    unit = shrinking(Compose([Logit(0.05), Affine(torch.zeros(3), torch.ones(3))]))
    digits = torch.tensor([[0.0, 16.0, 3.0], [0.5, 0.1, 0.9]])
    for way in (
        unit.log_prob,
        unit.transform,
        ScoreDensity(probability_flow(lambda t, x: -x, VariancePreserving(event_shape=(3,))), unit.transform).score,
    ):
        with pytest.raises(
            FieldError, match=r"takes data from 0 to 1, but these reach from 0 to 16, beyond that in row 0 of 2"
        ):
            way(digits)
    assert unit.log_prob(digits[1:]).isfinite().all()
    assert unit.log_prob(torch.tensor([[0.0, 1.0, 0.5]])).isfinite().all()  # both ends have a logit
    assert "data_range=(0, 1)" in repr(unit)
    assert [end.tolist() for end in unit.data_range] == [0, 1]


def test_ranges_behind_affine_maps():
    byte = Compose([Affine([0.0, 0.0], 255.0), Logit()])
    assert [end.tolist() for end in byte.data_range] == [[0, 0], [255, 255]]
    flipped = Compose([Affine(1.0, -2.0), Bounded([0.0], [1.0])])
    assert [end.tolist() for end in flipped.data_range] == [[-1], [1]]
    assert Compose([Bounded([0.0], [None]), Logit()]).data_range[1] == math.inf
    assert Affine().data_range is None
    assert Compose([MeanFreeScale(), Logit()]).data_range is None
    with pytest.raises(FieldError, match="takes data from 0 to 1, but these reach from 0 to 2 "[:30]):
        byte(torch.tensor([[510.0, 0.0]]))


def test_values_that_cannot_be_read_are_passed():
    transform = Affine([0.0, 1.0], 2.0)
    y = torch.vmap(lambda z: transform(z[None])[0][0])(torch.ones(3, 2))
    torch.testing.assert_close(y, torch.tensor([[0.5, 0.0]]).expand(3, 2))


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.0, 0.0), (math.nan, 1.0), ([0.0, math.inf], 1.0), (0.0, [1.0, math.nan]), (0.0, math.inf)]
)
def test_no_scale(shift, scale):
    with pytest.raises(ValueError, match="shift and scale must be finite, and scale must not be zero, but they are"):
        Affine(shift, scale)


# Digits ------------------------------------------------------------------------------------------------------------------


def test_samples_have_the_digits_of_their_units():
    """Julian dates, of which float32 knows every fourth of a day."""
    date = FlowDensity(ContinuousFlow(still, 1), Affine([2.46e6], [0.1]))
    x = date.sample(20_000, generator=Generator().manual_seed(0))
    assert x.dtype == torch.float64
    assert len(x.unique()) > 19_900  # of float32's normal draws, of which a few are equal
    assert x.std().item() == pytest.approx(0.1, rel=0.03)
    large = FlowDensity(ContinuousFlow(still, 1), Affine([1e12], [10.0])).sample(200)
    assert len(large.unique()) == 200
    assert (large - 1e12).std().item() == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize(
    "transform", [Affine([2.46e6], [0.1]), Compose([Affine([2.46e6], [1.0]), Affine([0.0], [0.1])])]
)
def test_importance_weights_of_dates_are_those_of_a_normal(transform):
    date = FlowDensity(ContinuousFlow(still, 1), transform)
    target = Normal(torch.tensor(2.46e6, dtype=torch.float64), 0.1)
    seen = []

    def log_target(x):
        seen.append(x.dtype)
        return target.log_prob(x).squeeze(1)

    weights = date.importance_weights(log_target, 2_000, Generator().manual_seed(0))
    assert seen == [torch.float64]
    assert weights.samples.dtype == torch.float64
    assert weights.log_normalizer.item() == pytest.approx(0, abs=1e-4)  # float32's rounding of log p
    assert weights.effective_sample_size.item() == pytest.approx(2_000, rel=1e-5)


def test_a_target_that_writes_to_its_samples_or_gives_no_value_for_each():
    density = FlowDensity(ContinuousFlow(still, 1), Bounded([0.0], [None]))  # of exp(y), y standard normal

    def log_target(x):
        x.log_()
        return (-x.square() / 2 - x).sum(1)

    weights = density.importance_weights(log_target, 500, Generator().manual_seed(0))
    assert weights.log_normalizer.item() == pytest.approx(math.log(2 * math.pi) / 2, abs=1e-5)
    assert (weights.samples > 0).all()
    for wrong in (lambda x: x, lambda x: 0.0, lambda x: x.sum()):
        with pytest.raises(DivflowError, match="one real value per sample"):
            density.importance_weights(wrong, 4)


def test_scales_beyond_float32_and_beyond_float64():
    wide = FlowDensity(ContinuousFlow(still, 2), Affine([0.0, 0.0], [1e39, 1.0]))
    x = wide.sample(100)
    assert x.isfinite().all()
    truth = Normal(0.0, 1.0).log_prob((x / wide.transform.scale).float()).sum(1) - 39 * math.log(10)
    torch.testing.assert_close(wide.log_prob(x), truth, rtol=1e-5, atol=1e-3)
    beyond = FlowDensity(ContinuousFlow(still, 2), Affine([0.0, 0.0], [1e308, 1.0]))
    for way in (lambda: beyond.sample(100), lambda: beyond.importance_weights(lambda x: x.sum(1), 100)):
        with pytest.raises(
            FieldError, match=r"the samples must be finite, but is not in row .*beyond what float64 holds"
        ):
            way()


@pytest.mark.parametrize("name", DENSITIES)
def test_what_was_sampled_can_be_evaluated(name):
    density = DENSITIES[name]
    x = density.sample(20, generator=Generator().manual_seed(0))
    assert x.dtype == torch.float64
    assert density.log_prob(x).isfinite().all()


def test_scores_sample_in_float64_too():
    scored = UnnormalizedDensity(
        lambda x: -x, Affine([2.46e6], [0.1]), AnnealedLangevin((1,), (0.5,), steps_per_level=5)
    )
    assert len(scored.sample(50).unique()) == 50
    with pytest.raises(FieldError, match="int64"):
        scored.score(torch.tensor([[2460000]]))


@pytest.mark.parametrize("way", ["float", "half", "bfloat16", "double", "to"])
def test_the_transform_keeps_its_digits_wherever_the_density_goes(way):
    class Velocity(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(()))

        def forward(self, t, x):
            return -self.rate * x

    parts = [Bounded([0.0], [1e7]), Affine([2.46e6], [0.1])]
    density = FlowDensity(ContinuousFlow(Velocity(), 1), Compose(parts))
    moved = copy.deepcopy(density)
    moved = moved.to("cpu", torch.float16) if way == "to" else getattr(moved, way)()
    for mine, theirs in zip(density.transform.buffers(), moved.transform.buffers(), strict=True):
        assert theirs.dtype == torch.float64
        assert torch.equal(mine, theirs)
    assert density.dtype == torch.float32
    assert moved.dtype == (torch.float64 if way == "double" else torch.float32)


# Far data ---------------------------------------------------------------------------------------------------------------


def test_a_watched_density_warns_of_data_in_other_units():
    grams = shrinking(Affine([70.0, 170.0, 30.0], [10.0, 10.0, 10.0]))
    x = grams.sample(200, generator=Generator().manual_seed(0))
    grams.watch_units = True
    with pytest.warns(UnitsWarning, match=r"most of the 200 rows are farther from the base than any of 1,000 samples"):
        grams.evaluate(1000 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grams.evaluate(x)
        grams.evaluate(torch.cat([x, 1000 * x[:99]]))  # as many as that may be outliers
        grams.log_prob(1000 * x)  # a number that is right
        grams.evaluate(1000 * x[:0])
    assert grams.with_flow(grams.flow).watch_units

"""A control variate: unbiased, with the variance of what is left, whatever it wraps and wherever its matrix comes from."""

import functools

import pytest
import torch
from catalogue import Network, true_divergence, true_jacobian
from covering import alternated, covered

from divflow.divergence import (
    ControlVariate,
    Exact,
    FieldError,
    Hutchinson,
    HutchPlusPlus,
    XTrace,
    divergence,
    value_and_divergence,
)
from divflow.flow import ContinuousFlow
from divflow.flow.references import trajectories
from divflow.likelihood import Augmented, Quadrature
from divflow.operators.linearization import linearize_field
from divflow.verification import severed_fields

EVENT, SIZE, DISTINCT, DRAWS = (2, 3), 6, 5, 3_000
WRAPPED = [Hutchinson(), Hutchinson(2), Hutchinson(1, "gaussian"), HutchPlusPlus(5), XTrace(4)]
TIME = torch.tensor(0.4, dtype=torch.float64)
MODES = {mode.__name__: mode for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode)}


class Velocity(Network):
    """A field whose Jacobians differ from sample to sample."""

    def forward(self, t, x):
        return 2 * super().forward(t, 2 * x)


def repeated_samples():
    """A field, and a few samples, each as often as there are draws."""
    torch.manual_seed(0)
    return Velocity(EVENT), torch.randn(DISTINCT, *EVENT, dtype=torch.float64).repeat(DRAWS, 1, 1)


def rademacher_variance(jacobians):
    symmetric = (jacobians + jacobians.mT) / 2
    return 2 * (symmetric.square().sum(dim=(1, 2)) - symmetric.diagonal(dim1=1, dim2=2).square().sum(dim=1))


def by_rows(jacobians, count):
    """The matrix whose rows are given by one sample after another, `count` each."""
    rows = [[] for _ in range(SIZE)]
    for b, jacobian in enumerate(jacobians):
        for i in range(b * count, (b + 1) * count):
            rows[i % SIZE].append(jacobian[i % SIZE])
    return torch.stack([torch.stack(row).mean(dim=0) for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("references", ["batch", "samples"])
@pytest.mark.parametrize("wrapped", WRAPPED, ids=str)
def test_unbiased_with_an_honest_standard_error(wrapped, references, rank):
    field, x = repeated_samples()
    given = 3 if references == "batch" else torch.randn(4, *EVENT, dtype=torch.float64)
    result = ControlVariate(wrapped, given, rank).estimate(field, TIME, x)
    draws = result.divergence.view(DRAWS, DISTINCT)
    expected = true_divergence(field, TIME, x[:DISTINCT])
    assert ((draws.mean(dim=0) - expected).abs() < 5 * draws.std(dim=0) / DRAWS**0.5).all()
    torch.testing.assert_close(result.value, field(TIME, x))
    if result.standard_error is None:
        assert wrapped in (Hutchinson(), Hutchinson(1, "gaussian"))
    else:
        errors = result.standard_error.view(DRAWS, DISTINCT).square().mean(dim=0)
        # XTrace's is above where it has few terms (`test_sketched.py`), and never below.
        ratio = errors / draws.var(dim=0)
        assert ((ratio > 0.85) & (ratio < (3 if isinstance(wrapped, XTrace) else 1.15))).all()


@torch.no_grad()
def test_variance_of_what_given_samples_leave():
    field, x = repeated_samples()
    references = torch.randn(4, *EVENT, dtype=torch.float64)
    mean = true_jacobian(field, TIME, references).mean(dim=0)
    draws = divergence(field, TIME, x, ControlVariate(Hutchinson(), references)).view(DRAWS, DISTINCT)
    expected = rademacher_variance(true_jacobian(field, TIME, x[:DISTINCT]) - mean)
    torch.testing.assert_close(draws.var(dim=0), expected, rtol=0.15, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "references"), [(7, 1), (12, 3), (12, 4), (13, 5), (8, 7)])
def test_variance_of_what_rows_of_the_batch_leave(batch, references):
    """Rows by rows from the samples of one batch, each of them the mean over that many samples, or one more."""
    torch.manual_seed(1)
    field, x = Velocity(EVENT), torch.randn(batch, *EVENT, dtype=torch.float64)
    jacobians = true_jacobian(field, TIME, x)
    mean = by_rows(jacobians, -(-references * SIZE // batch))
    estimator = ControlVariate(Hutchinson(2_000), references)
    torch.testing.assert_close(
        estimator.estimate(field, TIME, x).standard_error.square() * 2_000,
        rademacher_variance(jacobians - mean),
        rtol=0.2,
        atol=0,
    )


@torch.no_grad()
def test_several_times_of_one_batch_have_a_matrix_each():
    """As a quadrature asks for them: exact at all times for a field that is linear in x, whatever it is in time."""
    torch.manual_seed(0)
    matrices = torch.randn(2, 4, 4, dtype=torch.float64)
    x, times = torch.randn(3 * 9, 4, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    t = times.repeat_interleave(9)
    (bundle,) = ControlVariate(Hutchinson(), 2).along(x[:9], [3])
    found = divergence(lambda t, x: x @ matrices[0].T + t.square().reshape(-1, 1) * (x @ matrices[1].T), t, x, bundle)
    torch.testing.assert_close(found, matrices[0].trace() + t.square() * matrices[1].trace())


def of_rank_two(size):
    """A field whose Jacobian at t is of rank two, not symmetric, with what it has in x on the diagonal: probes see none of it."""
    torch.manual_seed(0)
    left, right = torch.randn(2, 2, size, dtype=torch.float64)

    def field(t, x):
        return torch.tanh(x) + ((1 + t.reshape(-1, 1)) * (x @ right.T)) @ left

    return field, lambda t, x: (1 - x.tanh().square()).sum(dim=1) + (1 + t) * (left * right).sum()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("references", [8, "samples"])
@pytest.mark.parametrize(("size", "rank"), [(30, 4), (5_000, None)])
def test_low_rank_leaves_nothing_of_a_jacobian_of_low_rank(size, rank, references, mode):
    """But the diagonal: C is a diagonal's mean in a few directions, which is small where these are."""
    field, divergence_of = of_rank_two(size)
    x = 3 + torch.randn(40, size, dtype=torch.float64).abs()  # tanh's derivative is about zero there
    given = references if references != "samples" else x[:5].clone()
    with mode():
        result = ControlVariate(Hutchinson(2), given, rank).estimate(field, TIME, x)
        plain = Hutchinson(2).estimate(field, TIME, x)
    error = (result.divergence - divergence_of(TIME, x)).abs()
    assert error.max() < 0.01 * plain.standard_error.mean()
    assert (result.standard_error < 0.01 * plain.standard_error.mean()).all()


@torch.no_grad()
def test_rank_of_a_batch_is_what_one_product_a_sample_gives():
    """Five directions of a matrix of full rank: what is left of its singular values is little more than those after five."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(2, 40, 40, dtype=torch.float64)).Q
    values = 0.5 ** torch.arange(40, dtype=torch.float64)
    matrix, x = u @ values.diag() @ v, torch.randn(40, 40, dtype=torch.float64)
    for references, left in ((8, values[5:]), (4, values[10:]), (40, values[1:]), (100, values[1:])):
        result = ControlVariate(Hutchinson(500), references, 10).estimate(lambda t, x: x @ matrix.T, TIME, x)
        variance = result.standard_error.square().mean() * 500
        assert 0.1 * left.square().sum() < variance < 20 * left.square().sum()
    # With two passes, given references leave what the best matrix of that rank leaves.
    best = matrix - (u[:, :10] * values[:10]) @ v[:10]
    given = ControlVariate(Hutchinson(500), x[:2], 10).estimate(lambda t, x: x @ matrix.T, TIME, x)
    expected = rademacher_variance(best[None])
    torch.testing.assert_close(given.standard_error.square().mean()[None] * 500, expected, rtol=0.2, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("references", [3, "samples"])
def test_low_rank_at_several_times_and_between_those_that_are_known(references):
    field, divergence_of = of_rank_two(12)
    x, times = 12 + torch.rand(15, 12, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    estimator = ControlVariate(Hutchinson(), references if references == 3 else x[:4].clone(), 3)
    known = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    prepared = estimator.prepare(field, x, lambda given: (known, given.expand(3, *given.shape)))
    (bundle,) = prepared.along(x, [3])
    t = times.repeat_interleave(15)
    torch.testing.assert_close(divergence(field, t, x.repeat(3, 1), bundle), divergence_of(t, x.repeat(3, 1)))


@torch.no_grad()
@pytest.mark.parametrize("event", [(4,), (2, 3)])
def test_products_forward(event):
    field, x = Network(event), torch.randn(5, *event, dtype=torch.float64)
    vectors = torch.randn(3, 5, *event, dtype=torch.float64)
    at = linearize_field(field, TIME, x, twice=True)
    size = x[0].numel()
    expected = torch.einsum("kij,nkj->nki", true_jacobian(field, TIME, x), vectors.view(3, 5, size))
    torch.testing.assert_close(at.pushforward(vectors).view(3, 5, size), expected)
    with severed_fields("allow"):
        for constant in (lambda t, x: torch.ones_like(x), lambda t, x: x.detach() * 2):
            assert not linearize_field(constant, TIME, x, twice=True).pushforward(vectors).any()


@covered(
    event=[(), (1,), (5,), (3, 2, 2)],
    references=[1, 3, 16],
    dtype=[torch.float64, torch.float32],
    mode=MODES,
    rank=[None, 2],
)
def test_shapes_modes_and_one_evaluation(event, references, dtype, mode, rank):
    calls = []

    class Counted(Network):
        def forward(self, t, x):
            calls.append(1)
            return super().forward(t, x)

    field, estimator = Counted(event, dtype), ControlVariate(Hutchinson(), references, rank)
    for batch in (0, 1, 4):
        for t in (torch.tensor(0.3, dtype=dtype), torch.linspace(0, 1, batch, dtype=dtype)):
            calls.clear()
            with MODES[mode]():
                value, div = value_and_divergence(field, t, torch.randn(batch, *event, dtype=dtype), estimator)
            assert len(calls) == 1
            assert value.shape == (batch, *event)
            assert div.shape == (batch,)
            assert div.dtype == dtype
            assert div.requires_grad == (mode == "enable_grad" and batch > 0)


def test_a_batch_of_references_alone_is_exact():
    field, x = Network((3,)), torch.randn(4, 3, dtype=torch.float64)
    result = ControlVariate(Hutchinson(), 4).estimate(field, TIME, x)
    torch.testing.assert_close(result.divergence, true_divergence(field, TIME, x))
    assert not result.standard_error.any()


@pytest.mark.parametrize("references", [2, torch.ones(1, 3, dtype=torch.float64)], ids=["batch", "samples"])
def test_the_gradient_is_unbiased(references):
    draws, weights = 20_000, torch.randn(3, 3, dtype=torch.float64)
    x = torch.randn(1, 3, dtype=torch.float64).expand(draws, 3)
    copies = weights.expand(draws, 3, 3).clone().requires_grad_()

    def field(t, x):
        return torch.tanh(torch.einsum("bij,bj->bi", copies if len(x) == draws else copies[:1], x))

    (gradients,) = torch.autograd.grad(
        divergence(field, 0.0, x, ControlVariate(Hutchinson(), references)).sum(), copies
    )
    (expected,) = torch.autograd.grad(divergence(field, 0.0, x[:1]).sum(), copies)
    error = gradients.std(dim=0) / draws**0.5
    assert ((gradients.mean(dim=0) - expected[0]).abs() < 5 * error + 1e-12).all()


LIKELIHOODS = {"quadrature": Quadrature(7), "nested": Quadrature(tolerance=1e-4), "augmented": Augmented()}


@torch.no_grad()
@alternated(likelihood=LIKELIHOODS, references=["batch", "samples"])
def test_log_densities(likelihood, references):
    """Unbiased with an honest standard error, and less noise than the wrapped estimator's."""
    likelihood, given = LIKELIHOODS[likelihood], references == "samples"
    torch.manual_seed(0)
    velocity, x = Velocity((6,)), torch.randn(1, 6, dtype=torch.float64) + 0.1 * torch.randn(4_000, 6).double()
    plain = ContinuousFlow(velocity, 6, estimator=Hutchinson(2), likelihood=likelihood).double()
    flow = plain.replace(estimator=ControlVariate(Hutchinson(2), x[:3] if given else 16))
    truth = plain.replace(estimator=Exact()).log_prob(x)
    result = flow.evaluate(x, diagnostics=False)
    errors = result.log_prob - truth
    assert errors.mean().abs() < 5 * errors.std() / 4_000**0.5
    assert errors.var() < 0.25 * (plain.log_prob(x) - truth).var()
    if isinstance(likelihood, Quadrature):
        torch.testing.assert_close(result.standard_error.square().mean(), errors.var(), rtol=0.15, atol=0)


@torch.no_grad()
def test_given_references_are_carried_along_once_and_again_for_other_parameters():
    torch.manual_seed(0)
    calls = []

    class Counted(Velocity):
        def forward(self, t, x):
            calls.extend([1] if len(x) == 5 else [])
            return super().forward(t, x)

    velocity, x = Counted((6,)), torch.randn(50, 6, dtype=torch.float64)
    flow = ContinuousFlow(velocity, 6, estimator=ControlVariate(Hutchinson(), x[:5])).double()
    for t_base, t_data in ((0.0, 1.0), (1.0, 0.0)):
        flow.t_base, flow.t_data = t_base, t_data
        flow.log_prob(x)
        assert calls
        calls.clear()
        flow.log_prob(x)
        assert not calls
        velocity.first.weight.mul_(1.5)
    # The curve of matrices is that of the references' own trajectories.
    prepared = flow.estimator.prepare(flow.field(), x, functools.partial(trajectories, flow, None)).references
    states = flow.trajectory(x[:5], [flow.t_data, *prepared.times.tolist()])[1:]
    for t, state, matrix in zip(prepared.times, states, prepared.matrices.rows, strict=True):
        torch.testing.assert_close(matrix, true_jacobian(velocity, t, state).mean(dim=0), rtol=1e-4, atol=1e-4)
    middle = prepared.at((prepared.times[3:4] + prepared.times[4:5]) / 2)
    torch.testing.assert_close(middle.rows[0], prepared.matrices.rows[3:5].mean(dim=0))


@torch.no_grad()
def test_conditional_flows_take_references_from_the_batch():
    class Conditional(Velocity):
        def forward(self, t, x, context):
            return super().forward(t, x) * context

    torch.manual_seed(0)
    x, context = torch.randn(1, 6, dtype=torch.float64).expand(400, 6), torch.rand(400, 1, dtype=torch.float64)
    flow = ContinuousFlow(Conditional((6,)), 6, estimator=ControlVariate(Hutchinson(), 8)).double()
    truth = flow.replace(estimator=Exact()).log_prob(x, context)
    errors = flow.log_prob(x, context) - truth
    assert errors.mean().abs() < 5 * errors.std() / 20
    assert errors.var() < 0.7 * (flow.replace(estimator=Hutchinson()).log_prob(x, context) - truth).var()
    with pytest.raises(FieldError, match="conditional flow.*references=16"):
        flow.replace(estimator=ControlVariate(Hutchinson(), x[:3])).log_prob(x, context)


def test_low_rank_of_what_has_no_second_derivatives():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.randn(10, 6)
    with torch.no_grad():
        assert divergence(lambda t, x: Doubled.apply(x), 0.0, x, ControlVariate(Hutchinson(), 2)).tolist() == [12] * 10
        with pytest.raises(FieldError, match=r"second derivatives.*Hutchinson"):
            divergence(lambda t, x: Doubled.apply(x), 0.0, x, ControlVariate(Hutchinson(), 2, rank=2))


@pytest.mark.parametrize("references", [0, -1, 2.5, "16", None])
def test_refuses_what_is_no_number_of_references(references):
    with pytest.raises(ValueError, match=r"references.*samples"):
        ControlVariate(Hutchinson(), references)


@pytest.mark.parametrize("likelihood", [Quadrature(), Quadrature(tolerance=0.1), Augmented()])
def test_events_of_no_entries_have_divergence_zero(likelihood):
    for references in (16, torch.zeros(3, 2, 0)):
        estimator, x = ControlVariate(Hutchinson(), references), torch.zeros(5, 2, 0)
        assert divergence(lambda t, x: 2 * x, 0.0, x, estimator).tolist() == [0.0] * 5
        flow = ContinuousFlow(lambda t, x: 2 * x, (2, 0), estimator=estimator, likelihood=likelihood)
        assert flow.log_prob(x).tolist() == [0.0] * 5


def test_refuses_what_it_can_not_do():
    with pytest.raises(ValueError, match=r"stochastic.*Exact"):
        ControlVariate(Exact())
    with pytest.raises(FieldError, match=r"one sample.*\(0, 3\)"):
        ControlVariate(Hutchinson(), torch.zeros(0, 3))
    with pytest.raises(FieldError, match="int64"):
        ControlVariate(Hutchinson(), torch.zeros(2, 3, dtype=torch.long))
    given = ControlVariate(Hutchinson(), torch.zeros(2, 4))
    for call in (
        lambda: divergence(lambda t, x: x, 0.0, torch.zeros(5, 3), given),
        lambda: ContinuousFlow(lambda t, x: x, 3, estimator=given).log_prob(torch.zeros(5, 3)),
    ):
        with pytest.raises(FieldError, match=r"\(3,\).*\(2, 4\).*\(r, \*event\)"):
            call()
    for rank in (0, 2.5, "4", True):
        with pytest.raises(ValueError, match=r"rank.*whole number"):
            ControlVariate(Hutchinson(), rank=rank)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [Hutchinson(2), HutchPlusPlus(4), XTrace(4)], ids=str)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("given", [False, True])
def test_a_row_that_is_not_finite_spoils_no_other(given, rank, wrapped):
    """Neither one of the batch nor a given reference; what is left of C has the others' variance."""
    torch.manual_seed(0)
    field, x = Velocity(EVENT), torch.randn(600, *EVENT, dtype=torch.float64)
    spoilt = x.clone()
    spoilt[3, 0, 1], spoilt[7] = torch.nan, torch.inf
    references = torch.cat([x[:5], torch.full_like(x[:1], torch.nan)]) if given else 16
    found = ControlVariate(wrapped, references, rank).estimate(field, TIME, spoilt, torch.Generator().manual_seed(1))
    others = torch.ones(600, dtype=torch.bool)
    others[[3, 7]] = False
    assert not found.divergence[3].isfinite()
    assert found.divergence[others].isfinite().all()
    error = (found.divergence - divergence(field, TIME, x, Exact()))[others]
    whole = ControlVariate(wrapped, x[:5] if given else 16, rank)
    usual = whole.estimate(field, TIME, x, torch.Generator().manual_seed(1)).divergence - divergence(field, TIME, x)
    assert error.square().mean() < 1.2 * usual.square().mean() + 1e-12


@torch.no_grad()
def test_references_of_which_none_is_finite_leave_the_wrapped_estimator():
    field, x = Velocity(EVENT), torch.randn(4, *EVENT, dtype=torch.float64)
    controlled = ControlVariate(Hutchinson(2), torch.full_like(x[:2], torch.nan))
    found, plain = (
        divergence(field, TIME, x, e.freeze(x, torch.Generator().manual_seed(0))) for e in (controlled, Hutchinson(2))
    )
    torch.testing.assert_close(found, plain)

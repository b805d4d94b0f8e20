"""Hutch++ and XTrace: unbiased, and so are their gradients; far less noise on Jacobians of low rank; no NaN at zero."""

import pytest
import torch
from catalogue import Network, true_jacobian
from torch import nn

from divflow.divergence import Exact, FieldError, Hutchinson, HutchPlusPlus, XTrace, divergence, sketched
from divflow.divergence.left_out import covariance
from divflow.flow import ContinuousFlow

SKETCHED = [HutchPlusPlus(3), HutchPlusPlus(7), XTrace(4), XTrace(7)]
SIZE = 10


def matrix_of_decaying_spectrum() -> torch.Tensor:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64)).Q
    return basis * torch.logspace(0, -4, SIZE, dtype=torch.float64) @ torch.randn(SIZE, SIZE, dtype=torch.float64)


def bilinear(matrix):
    return lambda t, x: x @ matrix.T


@pytest.mark.parametrize("estimator", SKETCHED, ids=str)
def test_unbiased_with_an_honest_standard_error(estimator):
    matrix, draws = matrix_of_decaying_spectrum(), 20_000
    x = torch.zeros(draws, SIZE, dtype=torch.float64)
    result = estimator.estimate(bilinear(matrix), 0.0, x)
    samples = result.divergence
    assert abs(samples.mean() - matrix.trace()) < 5 * samples.std() / draws**0.5
    if result.standard_error is None:
        assert estimator == HutchPlusPlus(3)
    else:
        # XTrace's is above where the covariance of terms, that is estimated, is small beside its noise.
        most = 3.5 if isinstance(estimator, XTrace) else 1.1
        assert 0.9 < result.standard_error.square().mean() / samples.var() < most


@pytest.mark.parametrize("estimator", SKETCHED, ids=str)
def test_the_gradient_is_unbiased(estimator):
    """With the basis held constant, the mean gradient is that of the trace, entry by entry."""
    draws = 20_000
    weights = matrix_of_decaying_spectrum().requires_grad_()
    scales = torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64)
    x = torch.zeros(draws, SIZE, dtype=torch.float64)
    # A copy of the parameter for every sample gives every sample's gradient.
    copies = weights.detach().expand(draws, SIZE, SIZE).clone().requires_grad_()
    div = divergence(lambda t, x: torch.einsum("bij,bj->bi", copies**2 * scales, x + 1), 0.0, x, estimator)
    (gradients,) = torch.autograd.grad(div.sum(), copies)
    (expected,) = torch.autograd.grad((weights**2 * scales).trace(), weights)
    error = gradients.std(dim=0) / draws**0.5
    assert ((gradients.mean(dim=0) - expected).abs() < 5 * error + 1e-12).all()


def test_far_less_variance_than_as_many_probes():
    x = torch.zeros(4_000, SIZE, dtype=torch.float64)
    field = bilinear(matrix_of_decaying_spectrum())
    plain, hutch, xtrace = (
        divergence(field, 0.0, x, estimator).var() for estimator in (Hutchinson(8), HutchPlusPlus(8), XTrace(8))
    )
    assert hutch < plain / 3
    assert xtrace < plain / 10


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("estimator", SKETCHED, ids=str)
def test_low_rank_and_zero(estimator, rank):
    """A Jacobian of a lower rank than the sketch: exact, with gradients that are numbers."""
    torch.manual_seed(1)
    first = nn.Parameter(torch.randn(SIZE, max(rank, 1), dtype=torch.float64) * (rank > 0))
    second = nn.Parameter(torch.randn(max(rank, 1), SIZE, dtype=torch.float64))
    result = estimator.estimate(lambda t, x: x @ first @ second, 0.0, torch.randn(3, SIZE, dtype=torch.float64))
    if rank <= (1 if estimator.num_products < 6 else 2):
        torch.testing.assert_close(result.divergence.detach(), (first @ second).trace().detach().expand(3))
    result.divergence.sum().backward()
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()


@pytest.mark.parametrize("make", [HutchPlusPlus, XTrace])
def test_enough_products_are_exact(make):
    field, x = Network((2, 3)), torch.randn(4, 2, 3, dtype=torch.float64)
    trace = true_jacobian(field, torch.tensor(0.2), x).diagonal(dim1=1, dim2=2).sum(dim=1)
    for products in (6, 7, 100):
        result = make(products).estimate(field, 0.2, x)
        torch.testing.assert_close(result.divergence, trace)
        assert result.standard_error.abs().max() == 0
    assert make(6).freeze(x) == Exact()


@pytest.mark.parametrize("estimator", [HutchPlusPlus(5), XTrace(4)], ids=str)
def test_images_dtypes_and_modes(estimator):
    for dtype in (torch.float32, torch.float64):
        field, x = Network((2, 3), dtype), torch.randn(5, 2, 3, dtype=dtype)
        frozen = estimator.freeze(x, torch.Generator().manual_seed(0))
        value, div = frozen(field, 0.3, x)
        assert div.dtype == dtype
        torch.testing.assert_close(value, field(torch.tensor(0.3), x))
        with torch.inference_mode():
            torch.testing.assert_close(frozen(field, 0.3, x).divergence, div.detach())
        assert torch.equal(estimator(field, 0.3, x, torch.Generator().manual_seed(0)).divergence, div)
    assert divergence(Network((2, 3)), 0.3, torch.zeros(0, 2, 3, dtype=torch.float64), estimator).shape == (0,)


@pytest.mark.parametrize("make", [lambda: HutchPlusPlus(2), lambda: XTrace(3), lambda: XTrace(4.5)])
def test_too_few_products(make):
    with pytest.raises(ValueError, match=r"at least \d products.*num_products is .*Hutchinson"):
        make()


def test_a_frozen_one_keeps_to_its_batch():
    frozen = XTrace(4).freeze(torch.zeros(3, 5))
    with pytest.raises(FieldError, match=r"3 samples of 5 dimensions.*\(2, 5\)"):
        frozen(lambda t, x: x, 0.0, torch.zeros(2, 5))


@pytest.mark.parametrize("estimator", [HutchPlusPlus(6), XTrace(6)], ids=str)
def test_log_density_with_its_standard_error(estimator):
    matrix = matrix_of_decaying_spectrum() - torch.eye(SIZE, dtype=torch.float64)
    flow = ContinuousFlow(bilinear(matrix), SIZE, estimator=estimator).double()
    x = torch.zeros(2_000, SIZE, dtype=torch.float64)
    with torch.no_grad():
        result = flow.evaluate(x)
    exact = flow.replace(estimator=Exact()).log_prob(x[:1])
    assert abs(result.log_prob.mean() - exact) < 5 * result.log_prob.std() / 2_000**0.5
    ratio = result.standard_error.square().mean().sqrt() / result.log_prob.std()
    assert 0.9 < ratio < (1.3 if isinstance(estimator, XTrace) else 1.1)


def terms_of(matrix, vectors):
    """XTrace's X_i by the definition, with a basis of its own for each of them."""
    size, found = len(matrix), []
    for i in range(len(vectors)):
        images = matrix @ torch.cat([vectors[:i], vectors[i + 1 :]]).T
        rest = torch.eye(size, dtype=matrix.dtype)
        if images.shape[1]:
            basis = torch.linalg.qr(images).Q
            rest = rest - basis @ basis.T
        u = rest @ vectors[i] / (rest @ vectors[i]).norm()
        in_range = (matrix @ (torch.eye(size, dtype=matrix.dtype) - rest)).trace()
        found.append(in_range + (size - len(vectors) + 1) * u @ matrix @ u)
    return torch.stack(found)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_covariance_of_terms_is_what_its_docstring_says(count, monkeypatch):
    matrix, seen = matrix_of_decaying_spectrum() + torch.eye(SIZE, dtype=torch.float64), []
    monkeypatch.setattr(sketched, "covariance", lambda found: seen.append(found) or covariance(found))
    XTrace(2 * count).estimate(bilinear(matrix.T), 0.0, torch.zeros(3, SIZE, dtype=torch.float64))
    (found,) = seen
    for sample in range(3):
        vectors = found.vectors[:, sample]
        terms = terms_of(matrix, vectors)
        torch.testing.assert_close(found.terms[:, sample], terms)
        products = []
        for i in range(count):
            for j in range(count):
                if i != j:
                    without_j = terms_of(matrix, torch.cat([vectors[:j], vectors[j + 1 :]]))[i - (i > j)]
                    without_i = terms_of(matrix, torch.cat([vectors[:i], vectors[i + 1 :]]))[j - (j > i)]
                    products.append((terms[i] - without_j) * (terms[j] - without_i))
        torch.testing.assert_close(covariance(found)[sample], torch.stack(products).mean())


@pytest.mark.parametrize("products", [8, 28])
def test_the_error_of_xtrace_near_all_dimensions(products):
    """Its terms share nearly all of what they are made of: by their spread the error was 39 % too small."""
    size = 32
    matrix = torch.eye(size, dtype=torch.float64) + 0.00625 * torch.randn(
        size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    found = XTrace(products).estimate(
        bilinear(matrix), 0.0, torch.zeros(2_000, size, dtype=torch.float64), torch.Generator().manual_seed(1)
    )
    error = found.divergence - matrix.trace()
    assert 0.9 < found.standard_error.square().mean() / error.square().mean() < 1.15
    assert (error.abs() <= 2 * found.standard_error).double().mean() > (0.88 if products == 8 else 0.93)

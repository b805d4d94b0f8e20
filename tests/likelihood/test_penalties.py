"""The penalties of RNODE: integrals along the trajectory, in closed form for a linear flow."""

import pytest
import torch

from divflow.divergence import Exact, Hutchinson, HutchPlusPlus
from divflow.flow import ContinuousFlow
from divflow.likelihood import PENALTIES, Augmented, Quadrature

ALL = tuple(PENALTIES)
MATRIX = torch.tensor([[-0.5, 0.3, 0.0], [0.2, 0.4, -0.6], [0.1, 0.0, 0.3]], dtype=torch.float64)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(MATRIX.clone())

    def forward(self, t, x):
        return x @ self.matrix.T


def flow(estimator, t_base=0.0, t_data=1.5):
    return ContinuousFlow(Linear(), 3, estimator=estimator, t_base=t_base, t_data=t_data).double()


@pytest.mark.parametrize(("t_base", "t_data"), [(0.0, 1.5), (1.5, 0.0)])
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson(2), Hutchinson(1, "gaussian"), HutchPlusPlus(3)], ids=str)
def test_kinetic_energy(estimator, t_base, t_data):
    """The integral of |A exp(A (t - t_data)) x|^2, by many midpoints."""
    x = torch.randn(4, 3, dtype=torch.float64)
    result = flow(estimator, t_base, t_data).evaluate(x, penalties=("kinetic_energy",))
    count = 4000
    times = t_base + (t_data - t_base) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    states = torch.matrix_exp(MATRIX * (times - t_data)[:, None, None]) @ x.T
    expected = (MATRIX @ states).square().sum(dim=1).mean(dim=0) * abs(t_data - t_base)
    assert set(result.penalties) == {"kinetic_energy"}
    torch.testing.assert_close(result.penalties["kinetic_energy"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("t_data", [1.5, -1.5])
@pytest.mark.parametrize(
    "estimator", [Exact(), Hutchinson(), Hutchinson(2), Hutchinson(1, "gaussian"), Hutchinson(1, "sphere")], ids=str
)
def test_jacobian_norm_is_unbiased(estimator, t_data):
    x = torch.zeros(4_000, 3, dtype=torch.float64)
    with torch.no_grad():
        norms = flow(estimator, 0.0, t_data).evaluate(x, penalties=ALL).penalties["jacobian_norm"]
    expected = 1.5 * MATRIX.square().sum()
    assert norms.std() > 0
    assert abs(norms.mean() - expected) < 5 * norms.std() / 4_000**0.5


def test_estimated_products_are_used_again_and_an_exact_divergence_takes_a_probe():
    x = torch.randn(4, 3, dtype=torch.float64)
    for estimator, evaluations in ((Exact(), 30), (Hutchinson(), 15)):
        tried = flow(estimator)
        assert tried.evaluate(x, diagnostics=False, penalties=("kinetic_energy",)).evaluations.divergence == 15
        assert tried.evaluate(x, diagnostics=False, penalties=ALL).evaluations.divergence == evaluations


@pytest.mark.parametrize("estimator", [Exact(), Hutchinson()], ids=str)
def test_differentiable(estimator):
    tried = flow(estimator)
    x = torch.zeros(20_000, 3, dtype=torch.float64)
    penalties = tried.evaluate(x, diagnostics=False, penalties=ALL).penalties
    (gradient,) = torch.autograd.grad(penalties["jacobian_norm"].mean(), tried.velocity.matrix)
    torch.testing.assert_close(gradient, 2 * 1.5 * MATRIX, rtol=0, atol=0.05)


def test_they_come_as_asked_and_leave_the_density_alone():
    tried, x = flow(Exact()), torch.randn(4, 3, dtype=torch.float64)
    plain, both = tried.evaluate(x), tried.evaluate(x, penalties=ALL[::-1])
    assert plain.penalties == {}
    assert list(both.penalties) == list(ALL[::-1])
    torch.testing.assert_close(both.log_prob, plain.log_prob)


def test_errors():
    tried, x = flow(Exact()), torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"jacobian_norm.*'hessian_norm'"):
        tried.evaluate(x, penalties=("hessian_norm",))
    with pytest.raises(ValueError, match="Augmented does not integrate penalties.*use Quadrature"):
        tried.replace(likelihood=Augmented()).evaluate(x, penalties=ALL)


@pytest.mark.parametrize("size", [4, 6])
def test_orthogonal_probes_along_the_nodes(size):
    """Unbiased, with an honest standard error, and better than independent ones where the Jacobian changes little."""
    torch.manual_seed(0)
    matrix = 0.4 * torch.randn(size, size, dtype=torch.float64)
    x = torch.zeros(3_000, size, dtype=torch.float64)

    class Independent(Hutchinson):
        def along(self, x, bundles, generator=None):
            return [self] * len(bundles)

    variances = []
    for estimator in (Hutchinson(2), Independent(2)):
        tried = ContinuousFlow(lambda t, x: x @ matrix.T, size, estimator=estimator, likelihood=Quadrature(7)).double()
        with torch.no_grad():
            result = tried.evaluate(x, diagnostics=False)
        exact = tried.replace(estimator=Exact()).log_prob(x[:1])
        error = result.log_prob.std() / 3_000**0.5
        assert abs(result.log_prob.mean() - exact) < 5 * error
        torch.testing.assert_close(result.standard_error.square().mean(), result.log_prob.var(), rtol=0.15, atol=0)
        variances.append(result.log_prob.var())
    assert variances[0] < 0.8 * variances[1]

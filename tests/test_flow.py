"""ContinuousFlow against closed forms, and the laws that every estimator and likelihood meets."""

import copy
import itertools
import math

import pytest
import torch
from catalogue import Network
from closed_forms import LinearVelocity, carried_normal
from covering import covered
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform

from divflow.divergence import Autograd, Exact, FieldError, Hutchinson, HutchPlusPlus, XTrace
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.solver import Solver, SolverError

TIGHT = Solver("dopri8", rtol=1e-9, atol=1e-9)
EXACT = {"auto": Exact(), "forward": Exact("forward"), "chunked": Exact(chunk_size=3), "autograd": Autograd()}
LIKELIHOODS = {"quadrature": Quadrature(), "split": Quadrature(7, tolerance=1e-8), "augmented": Augmented()}
EVENTS = [(4,), (1, 2, 2), (3, 1, 2)]


@covered(estimator=EXACT, likelihood=LIKELIHOODS, event=EVENTS, direction=[(0.0, 1.0), (1.0, 0.0), (0.2, 0.9)])
def test_gaussian_to_gaussian(estimator, likelihood, event, direction):
    velocity, (t_base, t_data) = LinearVelocity(event), direction
    flow = ContinuousFlow(
        velocity,
        event,
        estimator=EXACT[estimator],
        likelihood=LIKELIHOODS[likelihood],
        solver=TIGHT,
        t_base=t_base,
        t_data=t_data,
    ).double()
    truth = carried_normal(velocity, t_base, t_data)
    x = truth.sample((5,)).view(5, *event)
    with torch.no_grad():
        result = flow.evaluate(x)
    torch.testing.assert_close(result.log_prob, truth.log_prob(x.view(5, -1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.decode(result.latent).detach(), x, rtol=0, atol=1e-6)
    base = Normal(0.0, 1.0).log_prob(result.latent.flatten(1)).sum(dim=1)
    torch.testing.assert_close(result.log_prob, base + result.log_det)
    assert result.standard_error.abs().max() == 0
    samples, log_prob = flow.rsample_and_log_prob(5)
    torch.testing.assert_close(log_prob.detach(), truth.log_prob(samples.detach().view(5, -1)), rtol=0, atol=1e-6)


def test_samples_have_the_density():
    velocity = LinearVelocity((1, 2, 2))
    flow = ContinuousFlow(velocity, (1, 2, 2)).double()
    truth = carried_normal(velocity, 0.0, 1.0)
    samples = flow.sample(20_000).view(-1, 4)
    standard_error = truth.covariance_matrix.diagonal().sqrt() / math.sqrt(20_000)
    assert ((samples.mean(dim=0) - truth.loc).abs() < 5 * standard_error).all()
    torch.testing.assert_close(torch.cov(samples.T), truth.covariance_matrix, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("likelihood", [Quadrature(), Augmented()], ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_estimated_log_density_is_unbiased(distribution, likelihood):
    velocity = LinearVelocity((4,))
    flow = ContinuousFlow(
        velocity, 4, estimator=Hutchinson(2, distribution), likelihood=likelihood, solver=TIGHT
    ).double()
    truth, x = carried_normal(velocity, 0.0, 1.0), torch.randn(1, 4, dtype=torch.float64)
    with torch.no_grad():
        estimates = flow.log_prob(x.expand(4_000, 4))
    error = estimates.std() / math.sqrt(4_000)
    assert error > 1e-4
    assert abs(estimates.mean() - truth.log_prob(x)) < 5 * error


def test_fresh_probes_at_each_node_have_a_lower_variance_and_report_it():
    flow = ContinuousFlow(LinearVelocity((6,)), 6, estimator=Hutchinson(2), solver=TIGHT).double()
    x = torch.randn(1, 6, dtype=torch.float64).expand(3_000, 6)
    with torch.no_grad():
        fresh = flow.evaluate(x)
        fixed = flow.replace(likelihood=Augmented()).log_prob(x)
    assert fixed.var() > 5 * fresh.log_prob.var()
    torch.testing.assert_close(fresh.standard_error.square().mean(), fresh.log_prob.var(), rtol=0.1, atol=0)
    assert flow.replace(estimator=Hutchinson(1)).evaluate(x[:2]).standard_error is None


@pytest.mark.parametrize("estimator", [Hutchinson(3), HutchPlusPlus(6), XTrace(6)], ids=str)
def test_one_draw_for_all_nodes_has_errors_that_add_up(estimator):
    flow, draws = (
        ContinuousFlow(LinearVelocity((12,)), 12, solver=Solver("rk4"), likelihood=Quadrature(7)).double(),
        2_000,
    )
    x = torch.randn(1, 12, dtype=torch.float64).expand(draws, 12)
    with torch.no_grad():
        found = flow.replace(estimator=estimator.freeze(x)).evaluate(x)
    ratio = found.standard_error.square().mean() / found.log_prob.var()
    assert 0.85 < ratio < (2 if isinstance(estimator, XTrace) else 1.2)


@pytest.mark.parametrize("likelihood", [Quadrature(), Augmented()], ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("estimator", [Exact(), Hutchinson(2)], ids=lambda estimator: type(estimator).__name__)
def test_gradients_in_parameters_x_times_and_context(estimator, gradient, likelihood):
    class Conditional(Network):
        def forward(self, t, x, context):
            return super().forward(t, x * context)

    flow = ContinuousFlow(
        Conditional((3,)),
        3,
        estimator=estimator,
        likelihood=likelihood,
        solver=Solver("dopri5", rtol=1e-10, atol=1e-10, gradient=gradient),
        t_base=nn.Parameter(torch.tensor(0.1, dtype=torch.float64)),
        t_data=nn.Parameter(torch.tensor(0.8, dtype=torch.float64)),
    ).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    context = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)

    def total():
        return flow.log_prob(x, context, torch.Generator().manual_seed(0)).sum()

    tensors = [x, context, flow.t_base, flow.t_data, flow.velocity.first.weight, flow.velocity.last.bias]
    gradients = torch.autograd.grad(total(), tensors)
    with torch.no_grad():
        for tensor, gradient_of in zip(tensors, gradients, strict=True):
            direction = torch.randn_like(tensor)
            tensor += 1e-4 * direction
            above = total()
            tensor -= 2e-4 * direction
            below = total()
            tensor += 1e-4 * direction
            expected = (above - below) / 2e-4
            torch.testing.assert_close((gradient_of * direction).sum(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", [Quadrature(5), Augmented()], ids=lambda likelihood: type(likelihood).__name__)
def test_second_derivatives_of_log_prob(likelihood):
    flow = ContinuousFlow(
        Network((2,)), 2, likelihood=likelihood, solver=Solver("rk4", options={"step_size": 0.25})
    ).double()
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: flow.log_prob(x), (x,))


def test_score_of_a_gaussian_and_its_laplacian():
    """Two derivatives of log p in x, against the closed form of a Gaussian."""
    from divflow.operators import gradient, hessian

    velocity = LinearVelocity((3,))
    flow, truth = ContinuousFlow(velocity, 3, solver=TIGHT).double(), carried_normal(velocity, 0.0, 1.0)
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = -(x - truth.loc) @ truth.precision_matrix
    torch.testing.assert_close(gradient(flow.log_prob, x).detach(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        hessian(flow.log_prob, x).detach(), -truth.precision_matrix.expand(2, 3, 3), rtol=1e-5, atol=1e-5
    )


def test_quadrature_agrees_with_augmented_on_a_nonlinear_flow():
    flow = ContinuousFlow(Network((5,)), 5, solver=Solver("dopri5", rtol=1e-10, atol=1e-10)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    with torch.no_grad():
        a, b = flow.evaluate(x), flow.replace(likelihood=Augmented()).evaluate(x)
    torch.testing.assert_close(a.log_prob, b.log_prob, rtol=0, atol=1e-8)


class Stiff(nn.Module):
    """v = sin(w t) x: log-determinant (1 - cos w) / w a dimension in closed form, hard to integrate for large w."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, t, x):
        return torch.sin(self.w * t).reshape(-1, 1) * x


def test_quadrature_converges_and_bounds_its_error():
    x, w = torch.zeros(1, 1, dtype=torch.float64), 12.0
    truth = -(1 - math.cos(w)) / w - 0.5 * math.log(2 * math.pi)
    errors = []
    for nodes in (5, 7, 11, 15, 21):
        with torch.no_grad():
            result = ContinuousFlow(Stiff(w), 1, likelihood=Quadrature(nodes)).double().evaluate(x)
        errors.append(abs(result.log_prob.item() - truth))
        assert errors[-1] <= result.quadrature_error.item() + 1e-14
    assert all(fine < coarse / 5 for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("estimator", [Exact(), Hutchinson()], ids=lambda estimator: type(estimator).__name__)
def test_tolerance_splits_the_interval(estimator):
    x, w = torch.zeros(2, 1, dtype=torch.float64), 60.0
    truth = -(1 - math.cos(w)) / w - 0.5 * math.log(2 * math.pi)
    flow = ContinuousFlow(Stiff(w), 1, likelihood=Quadrature(15), estimator=estimator).double()
    with torch.no_grad():
        assert abs(flow.log_prob(x)[0].item() - truth) > 1e-3
        for tolerance in (1e-4, 1e-9):
            result = flow.replace(likelihood=Quadrature(15, tolerance=tolerance)).evaluate(x)
            assert abs(result.log_prob[0].item() - truth) < tolerance
            assert result.quadrature_error.max() < tolerance
    with pytest.raises(SolverError, match="3 intervals.*max_intervals"):
        flow.replace(likelihood=Quadrature(5, tolerance=1e-9, max_intervals=3)).log_prob(x)


@pytest.mark.parametrize(("likelihood", "nodes"), [(Quadrature(15), True), (Augmented(), False)])
@pytest.mark.parametrize(("method", "order"), [("midpoint", 2), ("rk4", 4)])
def test_convergence_order_of_the_log_density(method, order, likelihood, nodes):
    velocity = LinearVelocity((2,))
    truth, x = carried_normal(velocity, 0.0, 1.0), torch.ones(1, 2, dtype=torch.float64)

    def error(step):
        solver = Solver(method, options={"step_size": step})
        flow = ContinuousFlow(velocity, 2, likelihood=likelihood, solver=solver).double()
        with torch.no_grad():
            return abs(flow.log_prob(x) - truth.log_prob(x)).item()

    assert abs(math.log2(error(1 / 8) / error(1 / 16)) - order) < 0.5


def test_evaluations_are_counted_apart_and_correctly():
    calls = []

    class Counted(LinearVelocity):
        def forward(self, t, x):
            calls.append(len(x))
            return super().forward(t, x)

    flow = ContinuousFlow(Counted((3,)), 3, solver=Solver(gradient="adjoint")).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    flow.log_prob(x)  # the first call also asks whether the velocity takes one time a sample
    calls.clear()
    result = flow.evaluate(x, diagnostics=False)
    assert result.evaluations.forward == calls.count(4)
    assert result.evaluations.divergence == 15
    assert sum(size // 4 for size in calls if size != 4) == 15
    calls.clear()
    result.log_prob.sum().backward()
    assert result.evaluations.backward == calls.count(4)
    assert result.evaluations.backward > 0
    assert result.evaluations.diagnostics == 0
    calls.clear()
    spent = flow.evaluate(x).evaluations
    assert (spent.forward, spent.divergence) == (result.evaluations.forward, 15)
    assert 15 < spent.diagnostics < sum(size // 4 for size in calls)
    calls.clear()
    result = flow.replace(likelihood=Augmented(), solver=Solver()).evaluate(x)
    assert result.evaluations.forward == result.evaluations.divergence == len(calls)
    result.log_prob.sum().backward()
    assert result.evaluations.backward == 0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch, likelihood):
    flow = ContinuousFlow(Network((2, 2)), (2, 2), likelihood=LIKELIHOODS[likelihood]).double()
    x = torch.randn(batch, 2, 2, dtype=torch.float64)
    assert flow.log_prob(x).shape == (batch,)
    assert flow.sample(batch).shape == (batch, 2, 2)
    samples, log_prob = flow.rsample_and_log_prob(batch)
    assert samples.shape == (batch, 2, 2)
    assert log_prob.shape == (batch,)


@pytest.mark.parametrize("estimator", [Exact(), Hutchinson(3)], ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize("likelihood", [Quadrature(), Augmented()], ids=lambda likelihood: type(likelihood).__name__)
def test_inference_mode_as_lightning_validates(likelihood, estimator):
    flow = ContinuousFlow(LinearVelocity((3,)), 3, estimator=estimator, likelihood=likelihood).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = flow.log_prob(x, generator=torch.Generator().manual_seed(0)).detach()
    with torch.inference_mode():
        inside = flow.log_prob(x * 1, generator=torch.Generator().manual_seed(0))
    assert not inside.requires_grad
    torch.testing.assert_close(inside, expected)


def test_autocast_keeps_the_log_density_in_float32():
    flow = ContinuousFlow(LinearVelocity((3,), torch.float32), 3, solver=Solver("rk4"))
    x = torch.randn(64, 3)
    expected = flow.log_prob(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = flow.evaluate(x)
    assert result.log_prob.dtype == result.latent.dtype == result.log_det.dtype == torch.float32
    torch.testing.assert_close(result.log_prob.detach(), expected, rtol=0.05, atol=0.1)
    assert len(result.log_prob.unique()) == 64  # bfloat16 would have tied some of 64 values
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), flow.velocity.A)
    assert torch.isfinite(gradient).all()


def test_adjoint_enters_autocast_again():
    """`.backward()` runs outside of autocast; the adjoint must still differentiate the field that was solved."""
    dtypes = []

    class Recording(LinearVelocity):
        def forward(self, t, x):
            dtypes.append((x @ self.A.T).dtype)
            return super().forward(t, x)

    flow = ContinuousFlow(Recording((3,), torch.float32), 3, solver=Solver(gradient="adjoint"), likelihood=Augmented())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = flow.log_prob(torch.randn(4, 3)).sum()
    dtypes.clear()
    loss.backward()
    assert set(dtypes) == {torch.bfloat16}


def test_velocities_that_take_scalar_times_only():
    class ScalarOnly(nn.Module):
        def forward(self, t, x):
            return x * torch.cat([t.reshape(1), t.reshape(1) ** 2])

    class Broadcasting(nn.Module):
        """Given t (k,) with k = D it would silently scale the features instead of the samples."""

        def forward(self, t, x):
            return t * x

    for velocity, batch in ((ScalarOnly(), 3), (Broadcasting(), 2)):
        flow = ContinuousFlow(velocity, 2, solver=TIGHT).double()
        x = torch.randn(batch, 2, dtype=torch.float64)
        augmented = flow.replace(likelihood=Augmented()).log_prob(x)
        torch.testing.assert_close(flow.log_prob(x), augmented, rtol=0, atol=1e-7)


def test_context_is_repeated_with_the_nodes():
    class Conditional(LinearVelocity):
        def forward(self, t, x, context):
            return super().forward(t, x) * context[:, :1]

    velocity = Conditional((2,))
    flow = ContinuousFlow(velocity, 2, solver=TIGHT).double()
    x, context = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    together = flow.log_prob(x, context)
    for b in range(3):
        torch.testing.assert_close(
            together[b : b + 1], flow.log_prob(x[b : b + 1], context[b : b + 1]), rtol=0, atol=1e-7
        )
    assert flow.sample(3, context).shape == (3, 2)


def test_context_from_an_encoder():
    """A context with a history of its own, and weights that are recomputed at every call: neither can be copied."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

        def forward(self, t, x, context):
            return torch.tanh(self.layer(torch.cat([x, context], dim=1)))

    encoder, flow = nn.Linear(3, 2), ContinuousFlow(Conditional(), 2, estimator=Hutchinson())
    context = encoder(torch.randn(5, 3))
    flow.log_prob(torch.randn(5, 2), context).sum().backward()
    assert encoder.weight.grad.abs().sum() > 0


BASES = {
    "normal": lambda: Independent(Normal(torch.zeros(2), 2 * torch.ones(2)), 1),
    "broadcast": lambda: Independent(Normal(torch.zeros(2), 2.0), 1),
    "mixture": lambda: MixtureSameFamily(
        Categorical(torch.ones(3)), Independent(Normal(torch.randn(3, 2), torch.ones(3, 2)), 1)
    ),
    "multivariate": lambda: torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "transformed": lambda: TransformedDistribution(
        Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
        [AffineTransform(torch.ones(2), torch.full((2,), 3.0), 1)],
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_any_base_moves_and_is_saved_with_the_flow(name):
    base = BASES[name]()
    x = torch.randn(3, 2)
    flow = ContinuousFlow(lambda t, x: torch.zeros_like(x), 2, base=base)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(x))
    double = copy.deepcopy(flow).double()
    assert double.sample(4).dtype == torch.float64
    assert flow.sample(4).dtype == torch.float32
    torch.testing.assert_close(double.log_prob(x.double()).float(), flow.log_prob(x))
    assert base.sample().dtype == torch.float32  # the caller's own distribution is left alone
    shifted = {key: value + 0.25 for key, value in flow.state_dict().items() if value.is_floating_point()}
    before = flow.log_prob(x)
    flow.load_state_dict(flow.state_dict() | shifted)
    assert (flow.log_prob(x) != before).all()


def test_generator_reproduces_samples_and_leaves_the_default_one_alone():
    flow = ContinuousFlow(LinearVelocity((3,), torch.float32), 3, estimator=Hutchinson())
    state = torch.get_rng_state()
    a, b, c = (flow.sample(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    d, e = (flow.rsample_and_log_prob(4, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(d[1], e[1])


def test_rsample_reaches_the_parameters():
    flow = ContinuousFlow(LinearVelocity((3,), torch.float32), 3)
    samples, log_prob = flow.rsample_and_log_prob(5)
    for value in (samples.sum(), log_prob.sum()):
        assert torch.autograd.grad(value, flow.velocity.A, retain_graph=True)[0].abs().sum() > 0
    assert not flow.sample(2).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContinuousFlow(Network((2,)), 2, base=Normal(torch.zeros(2), torch.ones(2))), "Independent"),
        (lambda: ContinuousFlow(Network((2,)), 3, base=BASES["normal"]()), r"\(3,\).*\(2,\)"),
        (lambda: ContinuousFlow(Network((2,)), 2, base="normal"), "Distribution.*str"),
        (lambda: ContinuousFlow(Network((2,)), 2, t_base=1.0), "differ.*1.0"),
        (lambda: ContinuousFlow(lambda t, x: x, 2, solver=Solver(gradient="adjoint")), "nn.Module.*direct"),
        (
            lambda: ContinuousFlow(
                Network((2,)), 2, base=Independent(Normal(torch.zeros(2, requires_grad=True), torch.ones(2)), 1)
            ),
            "Detach",
        ),
        (
            lambda: ContinuousFlow(lambda t, x: x, 2).replace(solver=Solver(gradient="adjoint")),
            "nn.Module.*direct",
        ),
        (lambda: Quadrature(14), "odd.*14"),
        (lambda: Quadrature(tolerance=-1.0), r"tolerance.*-1\.0"),
    ],
)
def test_construction_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_call_errors():
    flow = ContinuousFlow(Network((2,), torch.float32), 2)
    with pytest.raises(FieldError, match=r"\(k, 2\).*\(4, 3\)"):
        flow.log_prob(torch.randn(4, 3))
    with pytest.raises(FieldError, match="int64"):
        flow.log_prob(torch.ones(4, 2, dtype=torch.long))
    with pytest.raises(FieldError, match=r"one row per sample.*\(3, 1\).*expand"):
        flow.log_prob(torch.randn(4, 2), torch.ones(3, 1))
    with pytest.raises(FieldError, match=r"\(4, 1\).*\(4, 2\)"):
        ContinuousFlow(lambda t, x: x[:, :1], 2).log_prob(torch.randn(4, 2))


def test_one_dimension_against_the_change_of_variables():
    """A nonlinear flow in 1-D: dx/dt = sin(x) carries z to 2 atan(tan(z / 2) e^t)."""
    flow = ContinuousFlow(lambda t, x: torch.sin(x), 1, solver=TIGHT).double()
    x = torch.linspace(-2.5, 2.5, 7, dtype=torch.float64)[:, None]
    z = (2 * torch.atan(torch.tan(x / 2) * math.exp(-1.0)))[:, 0]
    slope = math.exp(-1.0) / (torch.cos(x / 2) ** 2 + torch.sin(x / 2) ** 2 * math.exp(-2.0))[:, 0]
    expected = Normal(0.0, 1.0).log_prob(z) + slope.log()
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("centre", [0.2, 0.3, 0.7, 0.8])
def test_intervals_that_are_divided_late_come_before_others(centre):
    """A divergence with a narrow peak on one side and a wide one on the other, whose interval is divided a round later."""
    peaks = ((0.75, 0.05), (centre, 0.3))
    flow = ContinuousFlow(
        lambda t, x: sum(torch.exp(-(((t - c) / w) ** 2)) for c, w in peaks).reshape(-1, 1) * x,
        1,
        likelihood=Quadrature(7, tolerance=1e-3),
    )
    for t_base, t_data in ((0.0, 1.0), (1.0, 0.0)):
        flow.t_base, flow.t_data = t_base, t_data
        integral = sum(w * math.sqrt(math.pi) / 2 * (math.erf((1 - c) / w) + math.erf(c / w)) for c, w in peaks)
        log_det = flow.evaluate(torch.zeros(1, 1, dtype=torch.float64)).log_det.item()
        assert log_det == pytest.approx(integral * (t_base - t_data), abs=1e-3)


def test_zeros_do_not_hide_a_velocity_of_scalar_times():
    """For two samples of two dimensions x / (1 + t^2) broadcasts times against the wrong one, which zeros would not show."""
    flow = ContinuousFlow(lambda t, x: x / (1 + t**2), 2)
    log_prob = flow.log_prob(torch.zeros(2, 2, dtype=torch.float64))
    expected = torch.full((2,), -math.log(2 * math.pi) - 2 * math.atan(1), dtype=torch.float64)
    torch.testing.assert_close(log_prob, expected)


def test_a_narrow_domain_does_not_hide_a_velocity_of_scalar_times():
    """The same of a velocity that is NaN at states nearby: nothing is told from NaN."""
    flow = ContinuousFlow(lambda t, x: 0 * (0.3001 - x).sqrt() + x / (1 + t**2), 2, solver=Solver(rtol=1e-8, atol=1e-8))
    x = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
    z = x * math.exp(-math.atan(1))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1) - 2 * math.atan(1)
    torch.testing.assert_close(flow.log_prob(x), expected)

"""torch's default device and dtype decide where a user's new tensors are made, and nothing of what is computed.

The default device is "meta", on which no number exists: whatever were made on it by mistake would be noticed. Sizes are unlike
those of other tests, so that nothing is known already that would otherwise be verified here.
"""

import contextlib
import copy

import pytest
import torch
from test_devices import NETWORKS, OBJECTIVES
from torch import Generator, nn
from torch.nn import functional as F

from divflow import operators
from divflow.data import Digits, Simulations, Table, toy
from divflow.distributions import MeanFreeNormal
from divflow.divergence import (
    Autograd,
    ControlVariate,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    XTrace,
    check_field,
    divergence,
)
from divflow.energies import DoubleWell, Tempering, quartet
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine, Bounded, MeanFreeScale
from divflow.likelihood import Augmented, Quadrature
from divflow.networks import ConvNet, MLPPotential, PairField
from divflow.score import VarianceExploding, VariancePreserving, probability_flow
from divflow.score.sampling import PredictorCorrector, ProbabilityFlowODE, ReverseSDE
from divflow.solver import Solver

ESTIMATORS = {
    "auto": Exact(),
    "layered": Exact("layered"),
    "reverse": Exact("reverse"),
    "forward": Exact("forward"),
    "autograd": Autograd(),
    "rademacher": Hutchinson(2),
    "gaussian": Hutchinson(2, "gaussian"),
    "sphere": Hutchinson(2, "sphere"),
    "hutch++": HutchPlusPlus(6),
    "xtrace": XTrace(6),
    "control variate": ControlVariate(Hutchinson(2), references=1),
    "several references": ControlVariate(Hutchinson(2), torch.randn(3, 11), rank=2),
}
EXACT = {"auto", "layered", "reverse", "forward", "autograd"}


@contextlib.contextmanager
def default_device(device="meta"):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype=torch.float64):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


each_default = pytest.mark.parametrize("default", [default_device, default_dtype])
device_or_at_length = pytest.mark.parametrize(
    "default", [default_device, pytest.param(default_dtype, marks=pytest.mark.slow)]
)


def network(size):
    return nn.Sequential(nn.Linear(size, 13), nn.SiLU(), nn.LayerNorm(13), nn.Linear(13, size))


@each_default
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(default, name):
    net, x, estimator = network(11), torch.randn(4, 11), ESTIMATORS[name]
    expected = divergence(lambda t, z: net(z), 0.0, x, Exact("reverse"))
    with default():
        for _ in range(2):
            found = divergence(lambda t, z: net(z), 0.0, x, estimator)
        found.sum().backward()
        with torch.no_grad():
            divergence(lambda t, z: net(z), 0.0, x, estimator.freeze(x, Generator().manual_seed(0)))
    assert found.dtype == x.dtype
    assert found.device == x.device
    if name in EXACT:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_default
def test_colours_and_normalizations_between(default):
    x = torch.randn(2, 1, 9, 9)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    plain = ConvNet((1, 9, 9), hidden=(3,))
    with default():
        for field in (lambda t, z: net(z), plain):
            found = divergence(field, 0.5, x, Exact())
            torch.testing.assert_close(found, divergence(field, 0.5, x, Autograd()), rtol=1e-3, atol=1e-4)
            Exact().explain(field, 0.5, x)


@device_or_at_length
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(default, name):
    net, event = copy.deepcopy(NETWORKS[name][0]), NETWORKS[name][1]
    x = torch.randn(5, *event)
    with default():
        check_field(net, 0.3, x)
        Exact().explain(net, 0.3, x)
        value = divergence(net, 0.3, x)
    torch.testing.assert_close(value, divergence(net, 0.3, x), rtol=1e-4, atol=1e-4)
    assert value.dtype == x.dtype


@each_default
def test_operators(default):
    x, matrix = torch.randn(3, 7), torch.randn(7, 7)

    def f(z):
        return (F.layer_norm(z, (7,)) @ matrix).tanh().square().sum(dim=1) + z.logsumexp(dim=1)

    expected = operators.hessian(f, x).diagonal(dim1=1, dim2=2).sum(dim=1)
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 3.0])
    with default():
        for _ in range(2):
            found = operators.value_gradient_laplacian(f, x)
        torch.testing.assert_close(found.laplacian, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.gradient, operators.gradient(f, x), rtol=1e-4, atol=1e-4)
        assert operators.explain_laplacian(f, x).method == "forward_laplacian"
        operators.laplacian(f, x, Hutchinson(2))
        torch.testing.assert_close(
            operators.hessian(f, x).diagonal(dim1=1, dim2=2).sum(dim=1), expected, rtol=1e-4, atol=1e-4
        )
        assert operators.flat_gradient(lambda a, b: (a * b).sum(), [a, b]).tolist() == [5.0, 5.0, 3.0, 3.0]
        partial = operators.partial_derivative(lambda a, b: a * b**2, [a, b], wrt=1)
        jacobian = operators.parameter_jacobian(nn.Linear(7, 2, device="cpu", dtype=x.dtype), x)
    assert partial.tolist() == [[4.0, 6.0], [8.0, 12.0]]
    assert jacobian["weight"].shape == (3, 2, 2, 7)
    assert not jacobian["weight"].is_meta


@each_default
def test_potentials(default):
    net, x = MLPPotential(6, hidden=(9, 9), quadratic_rank=2), torch.randn(5, 6)
    with default():
        found = divergence(net, 0.5, x)
        check_field(net, 0.5, x)
    torch.testing.assert_close(found, divergence(lambda t, z: net(t, z), 0.5, x, Autograd()), rtol=1e-4, atol=1e-4)


FLOWS = {
    "dopri5": {},
    "as many nodes as it takes": {"likelihood": Quadrature(tolerance=1e-4)},
    "augmented": {"likelihood": Augmented()},
    "probes": {"estimator": Hutchinson(2)},
    "adjoint": {"solver": Solver(gradient="adjoint")},
    "fixed steps": {"solver": Solver("rk4", options={"step_size": 0.25})},
    "control variate": {"estimator": ControlVariate(Hutchinson(2), references=2)},
    "several references": {"estimator": ControlVariate(Hutchinson(2), references=torch.randn(3, 2), rank=1)},
}


class Velocity(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.net = network(size)

    def forward(self, t, x):
        return self.net(x) * (1 + t).reshape(-1, 1)


@each_default
@pytest.mark.parametrize("name", FLOWS)
def test_flows(default, name):
    velocity, x, noise = Velocity(2), torch.randn(6, 2), Generator()
    expected = ContinuousFlow(velocity, 2, **FLOWS[name]).log_prob(x, generator=noise.manual_seed(1))
    with default():
        flow = ContinuousFlow(velocity, 2, **FLOWS[name])
        found = flow.evaluate(
            x, generator=noise.manual_seed(1), penalties=() if name == "augmented" else ["kinetic_energy"]
        )
        found.log_prob.sum().backward()
        samples = flow.sample(4, generator=noise.manual_seed(0))
        flow.sample(4)
        if not flow.estimator.stochastic:
            weights = flow.importance_weights(lambda z: -z.square().sum(dim=1), 64, noise.manual_seed(0))
            assert weights.log_weights.device == x.device
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        samples,
        ContinuousFlow(velocity, 2, **FLOWS[name]).sample(4, generator=noise.manual_seed(0)),
        rtol=1e-3,
        atol=1e-4,
        check_dtype=False,
    )
    assert samples.device == x.device
    assert found.log_prob.dtype == x.dtype


def test_a_base_elsewhere_than_the_states():
    """A function holds no tensor that would tell where its states are; here the base holds numbers, on a device of its own."""
    flow = ContinuousFlow(lambda t, x: -x, 2)
    x = torch.randn(3, 2)
    with default_device():
        found = flow.log_prob(x)
    torch.testing.assert_close(found, flow.log_prob(x))


@each_default
def test_densities_of_data(default):
    velocity, x = Velocity(2), torch.randn(3, 2).sigmoid()
    with default():
        density = FlowDensity(ContinuousFlow(velocity, 2), Affine(torch.tensor([1.0, 2.0], device="cpu"), 2.0))
        density.log_prob(x)
        density.sample(3)
        for transform in (Affine(), Affine(1.0, 3.0), Bounded(-1.0, 2.0), MeanFreeScale(2.0)):
            y, log_det = transform(x[:, None])
            assert y.device == log_det.device == x.device
            torch.testing.assert_close(transform.inverse(y), x[:, None].double(), rtol=1e-4, atol=1e-5)


@device_or_at_length
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(default, name):
    net, x = Velocity(2), torch.randn(6, 2)
    expected = OBJECTIVES[name](net, x, generator=Generator().manual_seed(0)) if default is default_device else None
    with default():
        found = copy.deepcopy(OBJECTIVES[name])(net, x, generator=Generator().manual_seed(0))
        OBJECTIVES[name](net, x)
    if expected is not None:
        torch.testing.assert_close(found, expected)
    assert found.device == x.device


@each_default
@pytest.mark.parametrize("sde", [VariancePreserving(event_shape=2), VarianceExploding(event_shape=2)], ids=["vp", "ve"])
def test_scores(default, sde):
    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(-1.0))

        def forward(self, t, x):
            return self.scale * x / (1 + sde.std(t).reshape(-1, *[1] * (x.ndim - 1)).to(x) ** 2)

    score, x = Score(), torch.randn(3, 2)
    with default():
        flow = probability_flow(score, sde)
        flow.log_prob(x)
        flow.sample(2)
        for sampler in (ProbabilityFlowODE(sde), ReverseSDE(sde, 4), PredictorCorrector(sde, 4)):
            assert sampler(score, 3, generator=Generator().manual_seed(0)).samples.device == x.device


@each_default
def test_particles(default):
    net = PairField((4, 2), hidden=(8,))
    base = MeanFreeNormal((4, 2))
    sampler = Tempering(rungs=2, std=2.0, chains=20, warm_up=2, thin=1, leapfrog=1)
    with default():
        flow = ContinuousFlow(net, (4, 2), base=base, solver=Solver("rk4"))
        flow.importance_weights(lambda z: -z.square().sum(dim=(1, 2)), 8)
        with contextlib.suppress(ValueError):  # that neighbours of so few rungs hardly exchange states
            assert sampler(DoubleWell(), 40, Generator().manual_seed(0)).samples.device.type == "cpu"


def test_data_and_energies_are_of_the_cpu(tmp_path):
    table = tmp_path / "table.csv"
    rows = torch.randn(60, 2, generator=Generator().manual_seed(0)).tolist()
    table.write_text("a,b\n" + "\n".join(f"{a},{b}" for a, b in rows))
    with default_device():
        for make in (
            toy.two_moons,
            toy.circles,
            toy.swiss_roll,
            toy.two_spirals,
            toy.checkerboard,
            toy.eight_gaussians,
            toy.pinwheel,
        ):
            density = make()
            x = density.sample(5, Generator().manual_seed(0))
            assert x.device == density.log_prob(x).device == torch.device("cpu")
        for data in (toy.Toy(toy.two_moons, 10, 10, 10), Digits(), Table(table), Simulations("slcp", 100, num_test=10)):
            transform = data.transform
            assert all(buffer.device.type == "cpu" for buffer in transform.buffers())
        assert DoubleWell()(torch.randn(3, 4, 2, device="cpu")).device.type == "cpu"


@pytest.mark.slow
def test_quadrature_of_an_energy():
    with default_device():
        found = quartet(DoubleWell(), 4.0)
    assert abs(found.log_normalizer - 29.6672) < 1e-4

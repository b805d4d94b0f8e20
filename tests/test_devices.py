"""Everything again on each device of this machine: the same numbers as on the CPU, tensors where they belong.

On a machine with a CUDA device the tests run there, too: `pytest tests/test_devices.py`.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from catalogue import EVENTS, EXACT, STOCHASTIC, Network, quadratic, quadratic_divergence
from covering import covered
from run import DRAWN, SMALL_TOY, config
from torch import Generator, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import divflow
from divflow import adapters, operators
from divflow.distributions import MeanFreeNormal
from divflow.divergence import ControlVariate, Exact, Hutchinson, HutchPlusPlus, XTrace, check_field, divergence
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented, Quadrature
from divflow.matching import (
    ConditionalFlowMatching,
    EquivariantCoupling,
    LogitNormalTimes,
    OptimalTransportCoupling,
    TrigonometricPath,
    VariancePreservingPath,
)
from divflow.networks import (
    EGNN,
    MLP,
    ConcatSquash,
    ConvNet,
    GaussianFourierEmbedding,
    HollowEGNN,
    HollowMLP,
    MLPPotential,
    PairField,
    SinusoidalEmbedding,
    TokenMixer,
    UNet,
)
from divflow.runs.experiment import train
from divflow.score import SubVariancePreserving, VarianceExploding, VariancePreserving, probability_flow
from divflow.score.objectives import (
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
    TimeConditionalScoreMatching,
)
from divflow.score.sampling import AnnealedLangevin, PredictorCorrector, ProbabilityFlowODE, ReverseSDE
from divflow.solver import METHODS, Solver

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")
any_device = pytest.mark.parametrize("device", DEVICES)
# Where there is the CPU alone it is compared with itself, by what other tests hold to more.
each_device = pytest.mark.parametrize(
    "device", DEVICES if len(DEVICES) > 1 else [pytest.param("cpu", marks=pytest.mark.slow)]
)
generators = pytest.mark.parametrize("source", DEVICES)

ESTIMATES = STOCHASTIC | {"hutch++": HutchPlusPlus(6), "xtrace": XTrace(6)}
SDES = [
    VariancePreserving(event_shape=2),
    SubVariancePreserving(event_shape=2),
    VarianceExploding(event_shape=2, sigma_max=5.0),
]
OBJECTIVES = {
    "implicit": ImplicitScoreMatching(),
    "sliced": SlicedScoreMatching(2),
    "sliced, less variance": SlicedScoreMatching(2, variance_reduction=True),
    "finite differences": FiniteDifferenceScoreMatching(),
    "denoising": DenoisingScoreMatching(0.3),
    "levels": DenoisingScoreMatching((1.0, 0.3), weighting="sigma2"),
    "over time": TimeConditionalScoreMatching(SDES[0]),
    "over time, importance": TimeConditionalScoreMatching(SDES[0], weighting="likelihood", importance=True),
    "implicit over time": TimeConditionalScoreMatching(SDES[0], ImplicitScoreMatching()),
    "flow matching": ConditionalFlowMatching(),
    "flow matching, optimal transport": ConditionalFlowMatching(TrigonometricPath(), OptimalTransportCoupling()),
    "flow matching, logit-normal": ConditionalFlowMatching(VariancePreservingPath(), times=LogitNormalTimes()),
}
NETWORKS = {
    "MLP": (MLP((2,), hidden=(8,)), (2,)),
    "embedded time": (MLP((2,), hidden=(8,), time_embedding=SinusoidalEmbedding(8)), (2,)),
    "Fourier time": (MLP((2,), hidden=(8,), time_embedding=GaussianFourierEmbedding(8)), (2,)),
    "gated": (ConcatSquash((2,), hidden=(8,)), (2,)),
    "convolutions": (ConvNet((1, 4, 4), hidden=(4,)), (1, 4, 4)),
    "UNet": (UNet((1, 4, 4), channels=(4, 8)), (1, 4, 4)),
    "potential": (MLPPotential(2, hidden=(8, 8), quadratic_rank=1), (2,)),
    "hollow": (HollowMLP(4, hidden=(8,)), (4,)),
    "particles": (EGNN((3, 2), hidden=8, layers=1, types=[0, 0, 1]), (3, 2)),
    "hollow particles": (HollowEGNN((3, 2), hidden=8, types=[0, 0, 1]), (3, 2)),
    "pairs": (PairField((3, 2), hidden=(8,)), (3, 2)),
    "tokens": (TokenMixer((3, 2), hidden=(8,), width=8, heads=2), (3, 2)),
}
NORMALIZED = {
    "layer norm": [nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4)],
    "softmax": [nn.Linear(4, 8), nn.Softmax(dim=1), nn.Linear(8, 4)],
    "deep": [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)],
}


def close(result, expected, **tolerance):
    """That a result of any device has the numbers of one of the CPU."""
    torch.testing.assert_close(result.cpu(), expected, **tolerance)


def gradients(value, module):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, list(module.parameters()), allow_unused=True) if g is not None]
    )


@each_device
@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_exact_divergence_and_its_gradient(device, estimator, event):
    net, x, t = (
        Network(event).to(device),
        torch.randn(3, *event, dtype=torch.float64),
        torch.rand(3, dtype=torch.float64),
    )
    close(divergence(quadratic, t.to(device), x.to(device), estimator), quadratic_divergence(t, x))
    for time in (0.3, torch.tensor(0.3, device=device, dtype=torch.float64), t.to(device)):
        result = divergence(net, time, x.to(device), estimator)
        assert result.device.type == device
        local = copy.deepcopy(net).cpu()
        expected = divergence(local, time.cpu() if torch.is_tensor(time) else time, x)
        close(result, expected)
        close(gradients(result.sum(), net), gradients(expected.sum(), local))


@each_device
@generators
@pytest.mark.parametrize("estimator", ESTIMATES.values(), ids=ESTIMATES)
def test_an_estimate_is_a_function_of_its_generator_alone(device, source, estimator):
    net, x = Network((8,)).to(device), torch.randn(3, 8, dtype=torch.float64)
    results = [
        estimator.estimate(field, 0.3, point, Generator(source).manual_seed(0)).divergence
        for field, point in ((net, x.to(device)), (copy.deepcopy(net).cpu(), x))
    ]
    close(*results)
    frozen = estimator.freeze(x.to(device), Generator(source).manual_seed(0))
    close(divergence(net, 0.3, x.to(device), frozen), divergence(net, 0.3, x.to(device), frozen).cpu())


@each_device
@pytest.mark.parametrize(("network", "event"), NETWORKS.values(), ids=NETWORKS)
def test_networks(device, network, event):
    net, x = copy.deepcopy(network).to(device), torch.randn(3, *event)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    check_field(net, 0.3, x.to(device))
    result = divergence(net, torch.tensor(0.3, device=device), x.to(device))
    close(result, divergence(copy.deepcopy(net).cpu(), 0.3, x), rtol=1e-3, atol=1e-4)


@each_device
@pytest.mark.parametrize("layers", NORMALIZED.values(), ids=NORMALIZED)
def test_normalized_and_deep_networks(device, layers):
    net, x = nn.Sequential(*copy.deepcopy(layers)).double(), torch.randn(3, 4, dtype=torch.float64)
    there = copy.deepcopy(net).to(device)
    results = [
        divergence(lambda t, x, n=n: n(x), 0.0, p, Exact("layered")) for n, p in ((there, x.to(device)), (net, x))
    ]
    close(*results)
    close(*(gradients(r.sum(), n) for r, n in zip(results, (there, net), strict=True)))


@each_device
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("references", [1, torch.randn(3, 6)], ids=["of the batch", "given"])
def test_a_control_variate_along_a_flow(device, references, rank):
    net, x = Network((6,), torch.float32), torch.randn(8, 6)
    estimator = ControlVariate(Hutchinson(2), references, rank)
    flow = ContinuousFlow(net, 6, estimator=estimator, solver=Solver("rk4"), likelihood=Quadrature(7))
    there = copy.deepcopy(flow).to(device)
    results = [f.evaluate(p, generator=Generator().manual_seed(0)) for f, p in ((there, x.to(device)), (flow, x))]
    close(results[0].log_prob, results[1].log_prob, rtol=1e-3, atol=1e-3)
    close(results[0].standard_error, results[1].standard_error, rtol=1e-2, atol=1e-4)


@each_device
@pytest.mark.parametrize("types", [None, [0, 0, 1, 1]], ids=str)
def test_particles_are_aligned(device, types):
    noise, data = torch.randn(2, 10, 4, 2, dtype=torch.float64)
    close(EquivariantCoupling(types)(noise.to(device), data.to(device)), EquivariantCoupling(types)(noise, data))


@each_device
@pytest.mark.parametrize("solver", [Solver("dopri5"), Solver("rk4")], ids=["dense", "not dense"])
def test_as_many_nodes_as_it_takes(device, solver):
    base = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    flow = ContinuousFlow(Network((2,)), 2, likelihood=Quadrature(tolerance=1e-6), solver=solver, base=base)
    there, x = copy.deepcopy(flow).to(device), torch.randn(3, 2, dtype=torch.float64)
    results = [f.log_prob(p) for f, p in ((there, x.to(device)), (flow, x))]
    close(*results)
    close(*(gradients(r.sum(), f) for r, f in zip(results, (there, flow), strict=True)))


@each_device
@generators
def test_weights_of_particles(device, source):
    net = PairField((3, 2), hidden=(8,))
    flow = ContinuousFlow(net, (3, 2), base=MeanFreeNormal((3, 2)), solver=Solver("rk4")).to(device)

    def log_target(x):
        return -x.square().sum(dim=(1, 2))

    weights = flow.importance_weights(log_target, 16, generator=Generator(source).manual_seed(0))
    assert weights.samples.device.type == device
    close(weights.log_weights.logsumexp(0), torch.tensor(0.0), atol=1e-5, rtol=0)


LIKELIHOODS = {"quadrature": Quadrature(7), "augmented": Augmented()}


@each_device
@covered(method=METHODS, gradient=["direct", "adjoint"], likelihood=LIKELIHOODS)
def test_flows(device, method, gradient, likelihood):
    if method == "scipy_solver" and gradient == "adjoint":
        gradient = "direct"  # it has none
    solver = Solver(
        method, gradient=gradient, options={"step_size": 0.25} if METHODS[method] >= {"step_size"} else None
    )
    net, x = Network((2,)), torch.randn(3, 2, dtype=torch.float64)
    base = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    flow = ContinuousFlow(net, 2, likelihood=LIKELIHOODS[likelihood], solver=solver, base=base)
    there = copy.deepcopy(flow).to(device)
    with torch.set_grad_enabled(method != "scipy_solver"):
        results = [f.log_prob(point) for f, point in ((there, x.to(device)), (flow, x))]
        close(*results)
        if method != "scipy_solver":
            close(*(gradients(r.sum(), f) for r, f in zip(results, (there, flow), strict=True)))


@each_device
def test_a_time_may_be_a_tensor_of_the_device(device):
    start = torch.tensor(0.5, device=device, requires_grad=True)
    flow = ContinuousFlow(lambda t, x: -t.reshape(-1, 1) * x, 2, t_base=start, t_data=1.0)
    flow = flow.to(device)
    log_prob = flow.log_prob(torch.zeros(3, 2, device=device))
    close(log_prob, torch.full((3,), -math.log(2 * math.pi) + 0.75))  # -log det = the integral of 2 t
    (slope,) = torch.autograd.grad(log_prob.sum(), start)
    close(slope, torch.tensor(-3.0))
    with pytest.raises(ValueError, match="must differ"):
        ContinuousFlow(lambda t, x: x, 2, t_base=torch.tensor(1.0, device=device), t_data=1.0)


@each_device
@generators
def test_samples_of_a_flow(device, source):
    base = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]]))
    flow = ContinuousFlow(Network((2,), torch.float32), 2, base=base).to(device)
    first, again = (flow.sample(4, generator=Generator(source).manual_seed(1)) for _ in range(2))
    assert first.device.type == device
    close(first, again.cpu())
    samples, log_prob = flow.rsample_and_log_prob(4, generator=Generator(source).manual_seed(1))
    close(flow.log_prob(samples), log_prob.detach().cpu(), rtol=1e-3, atol=1e-3)
    close(flow.decode(flow.encode(first)), first.cpu(), rtol=1e-3, atol=1e-3)
    result = flow.replace(estimator=Hutchinson(2)).evaluate(first, generator=Generator(source).manual_seed(1))
    assert result.standard_error.device.type == result.quadrature_error.device.type == device


@each_device
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_adapters_follow_the_model_to_its_device(device, kind):
    """Without a `.to(device)` of the flow."""
    config = SimpleNamespace(prediction_type=kind, num_train_timesteps=20)
    scheduler = SimpleNamespace(alphas_cumprod=torch.linspace(0.99, 0.01, 20), config=config)
    x, labels, model = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1]), Labelled()
    flows = [
        adapters.from_diffusers(
            copy.deepcopy(model).to(where),
            scheduler,
            2,
            guidance_scale=2.0,
            unconditional=torch.tensor([2], device=where),
        )
        for where in (device, "cpu")
    ]
    close(*(flow.log_prob(x.to(where), labels.to(where)) for flow, where in zip(flows, (device, "cpu"), strict=True)))
    assert flows[0].sample(2, labels[:2].to(device)).device.type == device


class Labelled(nn.Module):
    """A field of x, t and a class."""

    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(3, 2, dtype=torch.float64), Network((2,))

    def forward(self, x, t, label):
        return self.net(t / 20, x) + self.table(label)


@each_device
def test_penalties_context_and_refinement(device):
    def velocity(t, x, context):
        return -context * x

    x, context = torch.ones(2, 3, device=device), torch.full((2, 1), 0.5, device=device)
    flow = ContinuousFlow(velocity, 3, likelihood=Quadrature(7, tolerance=1e-3)).to(device)
    result = flow.evaluate(x, context, penalties=("kinetic_energy", "jacobian_norm"))
    close(result.log_det, torch.full((2,), 1.5))
    close(result.penalties["jacobian_norm"], torch.full((2,), 0.75))
    close(result.penalties["kinetic_energy"], torch.full((2,), 0.75 * math.expm1(1.0)), rtol=1e-4, atol=1e-4)


@each_device
@pytest.mark.parametrize("likelihood", [Quadrature(7), Augmented()], ids=["quadrature", "augmented"])
def test_autocast(device, likelihood):
    flow = ContinuousFlow(Network((2,), torch.float32), 2, likelihood=likelihood, solver=Solver("rk4")).to(device)
    x = torch.randn(16, 2, device=device)
    with torch.autocast(device, torch.bfloat16):
        log_prob = flow.log_prob(x)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=0.05, atol=0.05)
    log_prob.sum().backward()


@each_device
@generators
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives(device, source, objective):
    net, x = Network((2,)), torch.randn(6, 2, dtype=torch.float64)
    there = copy.deepcopy(net).to(device)
    results = [
        objective(score, point, generator=Generator(source).manual_seed(0))
        for score, point in ((there, x.to(device)), (net, x))
    ]
    close(*results)
    close(gradients(results[0].sum(), there), gradients(results[1].sum(), net))
    assert objective(there, x.to(device)).device.type == device


@each_device
@generators
@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_sdes_and_their_samplers(device, source, sde):
    t, x = torch.tensor([0.2, 0.7]), torch.randn(2, 2)
    for there, here in zip(sde.marginal(t.to(device)), sde.marginal(t), strict=True):
        close(there, here)
    close(sde.drift(0.3, x.to(device)), sde.drift(0.3, x))
    close(sde.diffusion(t.to(device)), sde.diffusion(t))
    score = Network((2,), torch.float32).to(device)
    close(
        probability_flow(score, sde).to(device).log_prob(x.to(device)),
        probability_flow(copy.deepcopy(score).cpu(), sde).log_prob(x),
        rtol=1e-3,
        atol=1e-3,
    )
    for sampler in (
        ProbabilityFlowODE(sde, denoise=True),
        ReverseSDE(sde, num_steps=5),
        PredictorCorrector(sde, num_steps=5),
        AnnealedLangevin(2, (1.0, 0.5), steps_per_level=3, denoise=True),
    ):
        there, here = (
            sampler(net, 3, Generator(source).manual_seed(0)).samples for net in (score, copy.deepcopy(score).cpu())
        )
        assert there.device.type == device
        close(there, here, rtol=1e-3, atol=1e-3)


@each_device
def test_operators(device):
    net, x = Network((3,)), torch.randn(2, 3, dtype=torch.float64)
    there = copy.deepcopy(net).to(device)
    time = torch.tensor(0.3, dtype=torch.float64)

    def energy(z):
        return (z**3).sum(dim=1)

    close(operators.jacobian(there, time.to(device), x.to(device)), operators.jacobian(net, time, x))
    for operator in (operators.gradient, operators.hessian, operators.laplacian):
        close(operator(energy, x.to(device)), operator(energy, x))
    product = operators.partial_derivative(lambda a, b: a * b**2, (x.to(device), x[:1].to(device)), 1)
    close(product, 2 * x * x[:1])
    close(
        operators.flat_gradient(lambda a, b: (a * b).sum(), [x.to(device), x.to(device)]), torch.cat([x, x]).flatten()
    )
    there, here = (operators.parameter_jacobian(m, time.to(p), p) for m, p in ((there, x.to(device)), (net, x)))
    for name in here:
        close(there[name], here[name])


RUNS = {
    "flow": [*SMALL_TOY, "network.hidden=[16]"],
    "flow, estimated, augmented": [*SMALL_TOY, "network.hidden=[16]", "estimator=hutchinson", "likelihood=augmented"],
    "flow matching": [*SMALL_TOY, "network.hidden=[16]", "task=flow_matching", "coupling=optimal_transport"],
    "score": [
        *SMALL_TOY,
        "network.hidden=[16]",
        "task=score",
        "objective=denoising",
        "sde=vp",
        "sampler=reverse_sde",
        "sampler.num_steps=5",
    ],
    "score without SDE": [*SMALL_TOY, "network.hidden=[16]", "task=score", "objective=sliced_vr", "sde=none"],
    "digits": ["data=digits", "network.hidden=[16]"],
    "score of digits": ["data=digits", "task=score"],
    "images, conv": ["data=digits", "data.event_shape=[1,8,8]", "network=conv", "network.hidden=[4]"],
    "images, UNet": [
        "data=digits",
        "data.event_shape=[1,8,8]",
        "network=unet",
        "network.channels=[4,8]",
        "estimator=hutchinson",
        "estimator@evaluation.estimator=hutchinson",
    ],
}


def _mark(name):
    """Where there is the CPU alone, a few stand for all: what each network and task does there others tell."""
    return () if len(DEVICES) > 1 or name in ("flow, estimated, augmented", "score") else pytest.mark.slow


@any_device
@pytest.mark.parametrize(
    "overrides", [pytest.param(overrides, marks=_mark(name), id=name) for name, overrides in RUNS.items()]
)
def test_a_run_and_its_checkpoint_on_every_device(device, overrides, tmp_path):
    fast = [setting for setting in DRAWN if not setting.startswith(("device", "network"))]
    settings = config(
        *fast,
        f"device={'gpu' if device == 'cuda' else 'cpu'}",
        f"output_dir={tmp_path}",
        "trainer.max_steps=2",
        "callbacks.figures.num_samples=50",
        *overrides,
    )
    results = train(settings)
    assert all(math.isfinite(value) for value in results.values())
    assert list((tmp_path / "figures").glob("*.png"))
    assert np.isfinite(np.load(tmp_path / "samples.npy")).all()
    x = torch.rand(3, *np.load(tmp_path / "samples.npy").shape[1:])
    numbers = {}
    for target in DEVICES:
        density = divflow.load(tmp_path / "checkpoints" / "best.ckpt", map_location=target)
        numbers[target] = (
            density.score(x.to(target))
            if "sde=none" in overrides
            else density.log_prob(x.to(target), generator=Generator().manual_seed(0))
        )
        assert numbers[target].device.type == target
        close(numbers[target], numbers["cpu"], rtol=1e-3, atol=1e-2)


@any_device
def test_everything_on_the_default_device(device):
    """Where torch's default device is the one that all is on, no device is named."""
    torch.set_default_device(device)
    try:
        net, x, velocity = MLPPotential(5, hidden=(9,), quadratic_rank=1), torch.randn(4, 5), MLP(5, hidden=(9,))
        generator = Generator(device).manual_seed(0)
        for field in (net, velocity, lambda t, z: velocity(t, z).tanh()):
            check_field(field, 0.5, x)
            for estimator in (*EXACT.values(), *ESTIMATES.values(), ControlVariate(Hutchinson(2), 1)):
                divergence(field, 0.5, x, estimator)
                divergence(field, 0.5, x, estimator.freeze(x, generator))
            Exact().explain(field, 0.5, x)
        flows = [
            ContinuousFlow(velocity, 5),
            ContinuousFlow(lambda t, z: -z, 5),
            probability_flow(lambda t, z: -z, VariancePreserving(event_shape=5)),
        ]
        for flow in flows:
            assert flow.log_prob(x).device.type == device
            assert flow.sample(3).device.type == device
            assert (
                flow.importance_weights(lambda z: -z.square().sum(dim=1), 32, generator).samples.device.type == device
            )
        assert operators.laplacian(lambda z: z.sin().prod(dim=1), x).device.type == device
        density = divflow.flow.FlowDensity(flows[0], divflow.flow.transforms.Affine([0.0] * 5, 2.0))
        assert density.log_prob(x).device.type == device
        for objective in OBJECTIVES.values():
            assert objective(MLP(2, hidden=(9,)), x[:, :2], generator=generator).device.type == device
    finally:
        torch.set_default_device(None)

"""Densities of particles without centre of mass, against those of their coordinates in a basis of the subspace."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from run import config
from torch import Generator
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from divflow.distributions import BaseError, MeanFreeNormal, OnSubspace
from divflow.divergence import Autograd, Exact
from divflow.flow import ContinuousFlow
from divflow.networks import EGNN, HollowEGNN, PairField
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError, build_density
from divflow.solver import Solver
from divflow.tasks import FlowTask

PARTICLES, DIMENSIONS = 4, 3
TIGHT = Solver(rtol=1e-9, atol=1e-9)


def basis():
    """Orthonormal columns that span the vectors of sum zero, `(particles, particles - 1)`."""
    ones = torch.ones(PARTICLES, 1, dtype=torch.float64)
    return torch.linalg.svd(ones)[0][:, 1:]


def mean_free(k, seed=0):
    x = torch.randn(k, PARTICLES, DIMENSIONS, dtype=torch.float64, generator=Generator().manual_seed(seed))
    return x - x.mean(dim=1, keepdim=True)


def test_log_prob_is_that_of_coordinates_in_the_subspace():
    x, base = mean_free(5), MeanFreeNormal((PARTICLES, DIMENSIONS))
    coordinates = torch.einsum("knd,nm->kmd", x, basis()).flatten(1)
    expected = MultivariateNormal(torch.zeros(9).double(), torch.eye(9).double()).log_prob(coordinates)
    torch.testing.assert_close(base.log_prob(x), expected)
    torch.testing.assert_close(base.log_prob(x[:4].unflatten(0, (2, 2))), expected[:4].view(2, 2))


def test_samples_have_its_moments():
    torch.manual_seed(0)
    base, count = MeanFreeNormal((PARTICLES, DIMENSIONS)), 40_000
    samples = base.sample((count,))
    assert samples.mean(dim=1).abs().max() < 1e-6
    covariance = samples.flatten(1).T.cov()
    projection = torch.eye(PARTICLES) - 1 / PARTICLES
    expected = torch.kron(projection, torch.eye(DIMENSIONS))
    torch.testing.assert_close(covariance, expected, rtol=0, atol=6 / math.sqrt(count))
    entropy = 9 / 2 * math.log(2 * math.pi * math.e)
    assert -base.log_prob(samples).mean().item() == pytest.approx(entropy, abs=6 * math.sqrt(4.5 / count))


@pytest.mark.parametrize("estimator", [Exact(), Exact("reverse"), Autograd()], ids=str)
def test_a_linear_flow_has_its_density_on_the_subspace(estimator):
    """v = K x with a matrix K of the subspace carries the normal of coordinates to that of covariance exp(K) exp(K)^T."""
    q = basis()
    inner = 0.5 * torch.randn(3, 3, dtype=torch.float64, generator=Generator().manual_seed(2))
    matrix = q @ inner @ q.T
    flow = ContinuousFlow(
        lambda t, x: torch.einsum("nm,kmd->knd", matrix, x),
        (PARTICLES, DIMENSIONS),
        base=MeanFreeNormal((PARTICLES, DIMENSIONS)),
        estimator=estimator,
        solver=TIGHT,
    ).double()
    x, scale = mean_free(5), torch.linalg.matrix_exp(inner)
    coordinates = torch.einsum("knd,nm->kdm", x, q)
    truth = MultivariateNormal(torch.zeros(3).double(), scale @ scale.T)
    torch.testing.assert_close(flow.log_prob(x), truth.log_prob(coordinates).sum(1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(PairField, {"hidden": (8,)}), *((kind, {"hidden": 8, "mean_free": True}) for kind in (HollowEGNN, EGNN))],
)
def test_a_flow_of_particles_there_and_back(kind, options):
    """The density changes by the determinant of the whole map in a basis of the subspace."""
    torch.manual_seed(0)
    base = MeanFreeNormal((PARTICLES, DIMENSIONS))
    network = kind(base.event_shape, time_embedding=None, **options)
    flow = ContinuousFlow(network, base.event_shape, base=base, solver=TIGHT).double()
    with torch.no_grad():
        x, log_prob = flow.rsample_and_log_prob(2, generator=Generator().manual_seed(1))
        torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-6, atol=1e-6)
    assert x.mean(dim=1).abs().max() < 1e-8
    jacobian = torch.autograd.functional.jacobian(lambda z: flow.encode(z[None])[0], x[0])
    inside = torch.einsum("na,ndme,mb->adbe", basis(), jacobian, basis()).reshape(9, 9)
    expected = base.log_prob(flow.encode(x[:1])) + torch.linalg.slogdet(inside)[1]
    torch.testing.assert_close(log_prob[:1], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("default", [True, False])
def test_what_is_off_the_subspace_is_refused(default, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", default)  # as other libraries do at their import
    base = MeanFreeNormal((PARTICLES, DIMENSIONS))
    with pytest.raises(BaseError, match=r"centre of mass is zero.*lies 0\.1 off.*Subtract the mean"):
        base.log_prob(mean_free(2) + 0.1)
    drifting = ContinuousFlow(lambda t, x: torch.ones_like(x), base.event_shape, base=base).double()
    with pytest.raises(BaseError, match="lies 1 off"):
        drifting.log_prob(mean_free(2))
    for ways in (
        lambda: drifting.sample(2),
        lambda: drifting.decode(mean_free(2)),
        lambda: drifting.rsample_and_log_prob(2),
        lambda: drifting.importance_weights(lambda x: -x.square().sum(dim=(1, 2)), 2),
    ):
        with pytest.raises(BaseError, match="lies 1 off"):
            ways()
    for shape in ((3,), (1, 3), 4):
        with pytest.raises(BaseError, match=r"\(particles, dimensions\)"):
            MeanFreeNormal(shape)


def test_a_velocity_that_moves_the_centre_there_and_back_by_log_prob():
    """Its latents are on the subspace, and the data are not."""
    particle = torch.zeros(PARTICLES, DIMENSIONS)
    particle[0] = 1
    base = MeanFreeNormal((PARTICLES, DIMENSIONS))
    flow = ContinuousFlow(lambda t, x: x * particle, base.event_shape, base=base)
    z = mean_free(2).float()
    x = flow.trajectory(z, [0.0, 1.0])[-1]
    base.check_states(flow.encode(x))
    with pytest.raises(BaseError, match="centre of mass is zero"):
        flow.log_prob(x)


class OwnSubspace(Independent):
    """A base of one's own on a subspace: it says so itself, and derives from none of divflow's."""

    mean_free = True

    def __init__(self, event_shape):
        super().__init__(Normal(torch.zeros(tuple(event_shape)), 1.0), len(event_shape), validate_args=True)
        self.asked = []

    def check_states(self, value):
        self.asked.append("states")

    def check_velocity(self, velocity, t, x):
        raise BaseError("it leaves")


def described(base):
    plain = config("network=pair_field", "network.zero_init=false", "output_dir=x")
    transform = {"_target_": "divflow.flow.transforms.MeanFreeScale", "scale": 2.0}
    density = {"event_shape": [PARTICLES, DIMENSIONS], "transform": transform, "base": base}
    return OmegaConf.to_container(plain, resolve=True) | density


def test_a_base_says_of_itself_that_it_is_on_a_subspace():
    density = build_density(described({"_target_": f"{__name__}.OwnSubspace"}))
    base = density.flow.base.distribution
    assert isinstance(base, OnSubspace)
    assert base._validate_args
    density.log_prob(mean_free(2))
    assert base.asked == ["states"]
    with pytest.raises(BaseError, match="it leaves"):
        FlowTask(density).check(mean_free(2))


def test_one_that_says_nothing_is_on_the_whole_space():
    whole = Independent(Normal(torch.zeros(PARTICLES, DIMENSIONS), 1.0), 2)
    assert not isinstance(whole, OnSubspace)
    network = PairField((PARTICLES, DIMENSIONS))
    FlowTask(ContinuousFlow(network, (PARTICLES, DIMENSIONS), base=whole)).check(mean_free(2).float() + 1)
    with pytest.raises(ConfigError, match="base=mean_free"):
        build_density(described(None))


def test_its_config():
    plain = OmegaConf.to_container(
        config("base=mean_free", "network=pair_field", "network.zero_init=false", "output_dir=x"), resolve=True
    )
    described = plain | {"event_shape": [4, 3], "transform": {"_target_": "divflow.flow.transforms.Affine"}}
    density = build_density(described)
    assert isinstance(density.flow.base.distribution, MeanFreeNormal)
    assert density.log_prob(density.sample(3)).shape == (3,)
    del described["base"]  # what was saved before there were bases
    assert not isinstance(build_density(described).flow.base.distribution, MeanFreeNormal)


def test_a_score_has_none(tmp_path):
    with pytest.raises(ConfigError, match="a base is for flows"):
        train(config("task=score", "base=mean_free", f"output_dir={tmp_path}"))

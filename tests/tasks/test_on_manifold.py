"""Whole runs of data on manifolds by the real configs: trained, tested, loaded, sampled; and what is refused."""

import math

import pytest
import torch
from run import FAST, SMALL_TOY, config

import divflow
import divflow.data.toy
from divflow.data.toy import Toy
from divflow.flow import ContinuousFlow
from divflow.manifolds import ManifoldError, SpecialOrthogonal, Sphere, Torus
from divflow.matching import GeodesicPath, OptimalTransportCoupling
from divflow.networks import MLP, FourierFeatures, PeriodicFeatures
from divflow.runs.experiment import train
from divflow.saved.build import ConfigError
from divflow.tasks import FlowMatchingTask

MIXTURES = {"sphere_mixture": Sphere(2), "torus_mixture": Torus(2), "rotations_mixture": SpecialOrthogonal()}
SMALL = [*FAST, *SMALL_TOY]


@pytest.mark.parametrize("task", ["flow", "flow_matching"])
@pytest.mark.parametrize("data", MIXTURES)
def test_a_run_is_trained_tested_and_loaded(tmp_path, task, data):
    metrics = train(config(*SMALL, f"task={task}", f"data={data}", f"output_dir={tmp_path}"))
    assert {"test/nll", "test/gap"} <= metrics.keys()
    density, manifold = divflow.load(tmp_path / "checkpoints" / "best.ckpt"), MIXTURES[data]
    assert density.flow.manifold == manifold
    samples = density.sample(20)
    assert manifold.off(samples).max() < 1e-5
    assert density.log_prob(samples.float()).isfinite().all()
    if task == "flow_matching":
        restored = FlowMatchingTask.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
        assert restored.objective.path == GeodesicPath(manifold)


@pytest.mark.slow
@pytest.mark.parametrize("data", MIXTURES)
def test_training_comes_near_to_the_known_density(tmp_path, data):
    """To less than half of the way from the uniform density, with which it begins."""
    density, manifold = getattr(divflow.data.toy, data)(), MIXTURES[data]
    torch.manual_seed(0)
    of_uniform = (density.log_prob(density.sample(4_000)) + math.log(manifold.volume)).mean().item()
    steps = ["trainer.max_steps=600", "trainer.val_check_interval=600", "data.num_val=50", "data.num_test=400"]
    evaluation = ["evaluation.solver.options.step_size=0.02", "likelihood@evaluation.likelihood=quadrature_31"]
    words = [*FAST, "network.hidden=[128,128]", *evaluation, *steps, "task=flow_matching", f"data={data}"]
    assert train(config(*words, f"output_dir={tmp_path}"))["test/gap"] < of_uniform / 2


def test_the_features_suit_the_manifold(tmp_path):
    for data, kind in (("sphere_mixture", FourierFeatures), ("torus_mixture", PeriodicFeatures)):
        train(
            config(*SMALL, "task=flow_matching", f"data={data}", "trainer.max_steps=2", f"output_dir={tmp_path / data}")
        )
        density = divflow.load(tmp_path / data / "checkpoints" / "last.ckpt")
        assert isinstance(density.flow.velocity.field.features.parts[0], kind)


def test_the_coupling_takes_the_distance_of_the_manifold(tmp_path):
    words = [*SMALL, "task=flow_matching", "data=sphere_mixture", "coupling=optimal_transport"]
    train(config(*words, f"output_dir={tmp_path}"))
    restored = FlowMatchingTask.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert restored.objective.coupling == OptimalTransportCoupling(manifold=Sphere(2))


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["path=trigonometric"], ConfigError, "leaves the manifold of the data; use path=geodesic"),
        (["path.sigma_min=0.1"], ConfigError, "leaves the manifold of the data; use path=geodesic"),
        (["manifold=torus", "manifold.n=3"], ConfigError, r"the data lie on Sphere\(2\), but manifold=Torus\(3"),
        (["data=two_moons", "path=geodesic"], ConfigError, "is for data on a manifold, but these are not"),
        (["data=torus_mixture", "features=none"], ManifoldError, "the same point"),
    ],
)
def test_what_leaves_the_manifold_is_refused(tmp_path, words, kind, message):
    with pytest.raises(kind, match=message):
        train(config(*SMALL, "task=flow_matching", "data=sphere_mixture", *words, f"output_dir={tmp_path}"))


def test_a_manifold_may_be_given_for_data_of_ones_own(tmp_path):
    """Angles in the plane of two moons, which are within the period."""
    words = [*SMALL, "task=flow", "data=two_moons", "manifold=torus", "manifold.n=2", "features=manifold"]
    metrics = train(config(*words, f"output_dir={tmp_path}"))
    assert math.isfinite(metrics["test/nll"])
    assert divflow.load(tmp_path / "checkpoints" / "best.ckpt").flow.manifold == Torus(2)


def test_flow_matching_in_ones_own_hands():
    """The loss is that of tangent velocities, whatever normal part the network has."""
    flow = ContinuousFlow(MLP(3), 3, manifold=Sphere(2))
    task = FlowMatchingTask(flow)
    assert task.density.flow is flow
    data = Toy("sphere_mixture", num_train=64, num_val=20, num_test=30, batch_size=16)
    data.setup("fit")
    path = GeodesicPath(Sphere(2))
    x, noise, t = data.train.rows[:8].float(), Sphere(2).uniform().sample((8,)), torch.rand(8)
    point = path(t, noise, x)
    normal = (point.velocity - flow.velocity(t, point.x)) * point.x
    assert normal.sum(dim=1).abs().max() < 1e-5

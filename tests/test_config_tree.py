"""Where a setting stands: data describe data, recipes say what suits, and names of yesterday lead to those of today."""

import functools
import itertools

import pytest
import torch
from covering import alternated, thinned
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from run import ROOT, SMALL_TOY, config

from divflow.data.module import DataError
from divflow.runs.settings import check_settings
from divflow.saved.build import ConfigError
from divflow.solver import METHODS
from divflow.solver.step_control import ADAPTIVE

CONFIGS = ROOT / "configs"
DENSITIES = (
    "two_moons",
    "circles",
    "two_spirals",
    "swiss_roll",
    "eight_gaussians",
    "checkerboard",
    "pinwheel",
    "sphere_mixture",
    "torus_mixture",
    "rotations_mixture",
)
# What a recipe may choose, and what it then chooses from.
CHOICES = {
    "/recipe/network": "network",
    "/recipe/base": "base",
    "/recipe/features": "features",
    "/recipe/likelihood": "likelihood",
    "/recipe/evaluation/likelihood": "likelihood",
}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@functools.cache
def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(command, list(overrides))


def defaults(group: str, name: str) -> list:
    return list(OmegaConf.load(CONFIGS / group / f"{name}.yaml").get("defaults", []))


@thinned(name=names("data"))
def test_data_describe_data_and_nothing_else(name):
    assert "@package" not in (CONFIGS / "data" / f"{name}.yaml").read_text()
    groups = [next(iter(entry)) for entry in defaults("data", name) if not isinstance(entry, str)]
    assert set(groups) <= {"/dequantization@_global_.dequantization"}
    added = set(composed("evaluate", f"data={name}")) - set(composed("evaluate"))
    assert added <= {"dequantization"}
    # The same settings reach every command.
    given = (
        config(f"data={name}", "output_dir=x"),
        composed("evaluate", f"data={name}"),
        composed("sample", f"data={name}"),
    )
    own = [set(it.data) for it in given]
    assert own[0] == own[1] == own[2]


@thinned(name=names("recipe"))
def test_a_recipe_is_of_a_task_and_data_and_names_what_there_is(name):
    (pair,) = [it for it in itertools.product(names("task"), names("data")) if "_".join(it) == name]
    for entry in defaults("recipe", name):
        if isinstance(entry, str):
            assert entry == "_self_" or entry in names("recipe")
        else:
            ((group, choice),) = entry.items()
            assert choice in names(CHOICES[group.removeprefix("optional ")])
    given = [*(f"{group}={choice}" for group, choice in zip(("task", "data"), pair, strict=True)), "output_dir=x"]
    assert config(*given) == config(*given, f"recipe={name}")


def test_a_recipe_can_be_left_out():
    assert config("data=digits", "output_dir=x") != config("data=digits", "~recipe", "output_dir=x")


@pytest.mark.parametrize(
    ("task", "data", "hidden"),
    [
        ("flow", "two_moons", [64, 64]),
        ("flow_matching", "two_moons", [64, 64, 64]),
        ("score", "table", [64, 64, 64]),
        ("flow", "digits", [256, 256]),
        ("flow_matching", "digits", [256, 256]),
        ("score", "mnist", [512, 512]),
        ("flow_matching", "images", [512, 512]),
    ],
)
def test_a_recipes_network_goes_before_the_tasks(task, data, hidden):
    assert config(f"task={task}", f"data={data}", "output_dir=x").network.hidden == hidden


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["data=dw4", "network=pair_field"], "network._target_", "divflow.networks.PairField"),
        (["data=dw4", "base=normal"], "base", None),
        (["data=lj13", "likelihood=augmented"], "likelihood._target_", "divflow.likelihood.Augmented"),
        (["data=dw4", "likelihood@evaluation.likelihood=quadrature_7"], "evaluation.likelihood.nodes", 7),
        (["data=digits", "network=mlp"], "network.hidden", [64, 64]),
        (["data=digits", "network.hidden=[3]"], "network.hidden", [3]),
        (["data=digits", "task.optimizer.lr=0.5"], "task.optimizer.lr", 0.5),
        (["experiment=mnist_flow_matching"], "network._target_", "divflow.networks.UNet"),
        (["experiment=mnist_flow_matching"], "trainer.max_steps", 2800),
        (["experiment=mnist_flow_matching"], "likelihood.nodes", 7),
        (["experiment=mnist_unet_likelihood"], "likelihood.nodes", 31),
        (["experiment=smoke", "data=digits"], "trainer.max_steps", 20),
        (["experiment=smoke", "data=digits", "trainer.max_steps=7"], "trainer.max_steps", 7),
    ],
)
def test_the_command_line_beats_an_experiment_and_that_a_recipe(overrides, key, value):
    assert OmegaConf.select(config(*overrides, "output_dir=x"), key) == value


def test_a_recipe_and_data_of_ones_own(tmp_path):
    """As by --config-dir: data that name nothing else, and a recipe for them under a task."""
    for group in ("data", "recipe"):
        (tmp_path / group).mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: my_module.Mine\n")
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    assert config("data=mine", searched, "output_dir=x").network.hidden == [64, 64]
    (tmp_path / "recipe" / "flow_mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - optional /recipe/network: mlp_512x2\n\ntrainer:\n  max_steps: 3\n"
    )
    taken = config("data=mine", searched, "output_dir=x")
    assert (taken.network.hidden, taken.trainer.max_steps) == ([512, 512], 3)
    assert config("task=flow_matching", "data=mine", searched, "output_dir=x").network.hidden == [64, 64, 64]


@alternated(method=[name for name in names("solver") if name in METHODS], group=["solver", "solver@evaluation.solver"])
def test_a_method_is_a_solver_with_that_method(group, method):
    kind = "adaptive" if METHODS[method] == ADAPTIVE else "fixed"
    setting = "solver.method" if group == "solver" else "evaluation.solver.method"
    assert config(f"{group}={method}") == config(f"{group}={kind}", f"{setting}={method}")


@pytest.mark.parametrize(
    ("old", "new"), [("mlp_wide", "mlp_256x2"), ("mlp_wider", "mlp_512x2"), ("mlp_deep", "mlp_64x3")]
)
def test_networks_are_named_by_size(old, new):
    assert config(f"network={old}") == config(f"network={new}")
    width, depth = map(int, new.removeprefix("mlp_").split("x"))
    assert config(f"network={new}").network.hidden == [width] * depth


@pytest.mark.parametrize("density", DENSITIES)
def test_a_toy_density_by_its_name(density):
    old, new = (config(*it, *SMALL_TOY).data for it in ([f"data={density}"], ["data=toy", f"data.density={density}"]))
    assert {key for key in old if old[key] != new[key]} == {"density"}
    torch.testing.assert_close(instantiate(old).train.rows, instantiate(new).train.rows, rtol=0, atol=0)


def test_no_such_density_is_refused():
    with pytest.raises(HydraException) as refused:
        instantiate(config("data=toy", "data.density=two_mons").data)
    assert isinstance(refused.value.__cause__, DataError)
    assert "density must be one of two_moons, circles" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=score", "times=power"], "PowerTimes is for the times of flow matching. Use times=sde with task=score"),
        (["task=flow_matching", "times=sde"], "times=sde is for task=score. Use times=uniform, power"),
    ],
)
def test_times_of_the_other_task_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(config(*overrides, "output_dir=x"))


@pytest.mark.parametrize("command", ["evaluate", "sample"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["nonsense=1"],
        ["network=mlp"],
        ["base=mean_free"],
        ["trainer.max_steps=3"],
        ["data=digits", "trainer.max_steps=3"],
        ["data=digits", "data.pathh=x"],
        ["data=two_moons", "dequantization=uniform"],
        ["solver.method=rk4"],
        ["recipe=flow_digits"],
    ],
)
def test_what_a_trained_density_has_no_use_for_is_refused(command, overrides):
    with pytest.raises(ConfigCompositionException):
        composed(command, *overrides)

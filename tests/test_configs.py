"""The real config tree: the default composes, every option of every group instantiates, typos are refused."""

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from run import ROOT, config

from divflow.build import ConfigError, build_network
from divflow.divergence import Estimator
from divflow.likelihood import Likelihood
from divflow.solver import METHODS, Solver


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize(("group", "kind"), [("estimator", Estimator), ("likelihood", Likelihood), ("solver", Solver)])
def test_every_way_instantiates(group, kind):
    for option in options(group):
        node = config(f"{group}={option}")[group]
        assert isinstance(instantiate(node, _convert_="all"), kind)


def test_every_solver_of_torchdiffeq_with_gradients_has_a_config():
    assert set(options("solver")) == set(METHODS) - {"fixed_adams", "scipy_solver"} | {"dopri5_fast"}


@pytest.mark.parametrize("option", [name for name in options("network") if name != "custom"])
def test_every_network_is_a_field(option):
    shape = (1, 8, 8) if option == "conv" else (3,)
    node = OmegaConf.to_container(config(f"network={option}").network, resolve=True)
    network = build_network(node, shape)
    x = torch.randn(2, *shape)
    assert network(torch.tensor(0.1), x).shape == x.shape
    assert network(torch.rand(2), x).shape == x.shape


@pytest.mark.parametrize("option", [name for name in options("data") if name != "table"])
def test_every_data_set_loads(option):
    data = instantiate(config(f"data={option}").data, _convert_="all")
    batch = next(iter(data.train_dataloader()))
    assert batch.shape[1:] == data.event_shape


@pytest.mark.parametrize("option", options("device"))
def test_every_device_says_what_lightning_needs(option):
    assert set(config(f"device={option}").device) == {"accelerator", "devices", "strategy", "num_nodes", "precision"}


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
    ["estimater=exact", "estimator=exakt", "estimator.num_probes=4", "solver.tolerance=1", "trainer.steps=1"],
)
def test_typos_are_refused(override):
    with pytest.raises(ConfigCompositionException):
        config(override)


def test_a_velocity_must_be_a_module():
    with pytest.raises(ConfigError, match=r"collections\.OrderedDict made a OrderedDict.*nn\.Module"):
        build_network({"_target_": "collections.OrderedDict"}, (2,))

"""Objects from the plain config of a run: one recipe, for training and for loading back."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from torch import nn

from divflow.errors import DivflowError
from divflow.flow import ContinuousFlow
from divflow.tasks.density import FlowDensity

__all__ = ["ConfigError", "build_density", "build_network", "build_ways"]

_WAYS = ("estimator", "likelihood", "solver")


class ConfigError(DivflowError, ValueError):
    """A setting is not what the program needs."""


def build_density(config: Mapping[str, Any]) -> FlowDensity:
    """The untrained density that a config describes.

    Args:
        config: plain values. `network`, `estimator`, `likelihood`, `solver` and `transform` name classes by `_target_`;
            `event_shape`, `t_base` and `t_data` are the flow's.
    """
    shape = tuple(config["event_shape"])
    velocity = build_network(config["network"], shape)
    flow = ContinuousFlow(velocity, shape, **build_ways(config), t_base=config["t_base"], t_data=config["t_data"])
    return FlowDensity(flow, instantiate(config["transform"], _convert_="all"))


def build_ways(config: Mapping[str, Any]) -> dict[str, Any]:
    """The estimator, likelihood and solver that a config names; those it does not name are left out."""
    return {name: instantiate(config[name], _convert_="all") for name in _WAYS if config.get(name) is not None}


def build_network(config: Mapping[str, Any], event_shape: tuple[int, ...]) -> nn.Module:
    """The velocity network of a config, told the event shape if its class asks for it.

    Raises:
        ConfigError: what `_target_` makes is no module.
    """
    make = instantiate({**config, "_partial_": True}, _convert_="all")
    if "event_shape" in _free_arguments(make):
        make = functools.partial(make, event_shape=event_shape)
    network = make()
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"network._target_={config['_target_']} made a {type(network).__name__}; it must name an nn.Module, called as "
            "net(t, x)"
        )
    return network


def _free_arguments(make: functools.partial) -> set[str]:
    try:
        return set(inspect.signature(make.func).parameters) - set(make.keywords)
    except ValueError:  # some built-in types have no signature
        return set()

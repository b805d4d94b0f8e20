"""Densities and objectives from plain values: one recipe for training and for loading."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy

from divflow.distributions import OnSubspace
from divflow.divergence import Estimator
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import MeanFreeScale
from divflow.likelihood import Likelihood
from divflow.manifolds import Manifold
from divflow.operators.differentiating import evaluated
from divflow.saved.named import ConfigError, made, named
from divflow.score import ScoreDensity, UnnormalizedDensity
from divflow.score.objectives import Objective, TimeConditionalScoreMatching
from divflow.score.probability_flow import probability_flow
from divflow.score.sampling import Sampler
from divflow.score.scaling import ScaledScore
from divflow.score.sde import SDE
from divflow.solver import Solver

__all__ = [
    "WAYS",
    "ConfigError",
    "build_density",
    "build_network",
    "build_objective",
    "build_ways",
]

_KINDS = {"estimator": Estimator, "likelihood": Likelihood, "solver": Solver}
WAYS = tuple(_KINDS)


def build_density(config: Mapping[str, Any]) -> FlowDensity | UnnormalizedDensity:
    """Build the untrained density that a config describes.

    Args:
        config: plain values:

            - `network`, `estimator`, `likelihood`, `solver` and `transform` name classes by `_target_`;
            - `features`, by which the network sees x, name a class by `_target_`; None, or left out, for x itself;
            - `event_shape` is that of the data, as are `context_features` and `context_transform` if they have a context;
            - a flow has `t_base`, `t_data` and `base` (None for the standard normal, or the manifold's own);
            - data on a manifold have a `manifold`;
            - a score has `sde` (None for none), `data_std`, `noise_levels` and `sampler` (None for the probability flow of the SDE).

    Returns:
        A `FlowDensity`, `ScoreDensity` or `UnnormalizedDensity`.

    Raises:
        ConfigError: settings that do not fit together.
    """
    shape = tuple(config["event_shape"])
    network = build_network(config["network"], shape, config.get("context_features", 0), _build_features(config, shape))
    transform = instantiate(config["transform"], _convert_="all")
    base = _build_base(config.get("base"), shape)
    _check_base(base, transform)
    manifold = None if config.get("manifold") is None else made("manifold", config["manifold"], Manifold)
    if "sde" not in config:
        times = {name: config[name] for name in ("t_base", "t_data")}
        flow = ContinuousFlow(network, shape, **build_ways(config), **times, base=base, manifold=manifold)
        of_context = config.get("context_transform")
        return FlowDensity(flow, transform, None if of_context is None else instantiate(of_context, _convert_="all"))
    sde = _build_sde(config["sde"], shape, config.get("manifold"))
    sampler = _build_sampler(config["sampler"], sde, shape)
    levels = config["noise_levels"]
    if sde is None:
        return UnnormalizedDensity(network, transform, sampler, levels if isinstance(levels, Sequence) else None)
    if levels is not None:
        raise ConfigError(
            f"noise_levels={levels} are for sde=none, since over an SDE the noise is that of the SDE. Leave them out"
        )
    score = ScaledScore(network, sde, config["data_std"])
    return ScoreDensity(probability_flow(score, sde, **build_ways(config)), transform, sampler)


def build_objective(config: Mapping[str, Any], density: ScoreDensity | UnnormalizedDensity) -> Objective:
    """Build the score-matching objective of a config: `objective`, and over an SDE weighted by `times`.

    Raises:
        ConfigError: several noise levels are given to an objective that takes one, or others than it has.
    """
    objective = instantiate(config["objective"], _convert_="all")
    if isinstance(density, UnnormalizedDensity):
        trained, levels = getattr(objective, "sigma", None), config["noise_levels"]
        if (trained is not None or density.levels is not None) and trained != (density.levels or levels):
            raise ConfigError(
                f"noise_levels={levels} are for objective=denoising, which takes them as sigma. Give one level, or none, to other objectives"
            )
        return objective
    return TimeConditionalScoreMatching(density.sde, objective, **config["times"])


def build_ways(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the estimator, likelihood and solver that a config names; others are left out.

    Raises:
        ConfigError: a class that can't be found, or is of another kind.
    """
    return {name: made(name, config[name], kind) for name, kind in _KINDS.items() if config.get(name) is not None}


def build_network(
    config: Mapping[str, Any],
    event_shape: tuple[int, ...],
    context_features: int = 0,
    features: nn.Module | None = None,
) -> nn.Module:
    """Build the velocity network of a config, with the event shape if its class takes it, and what there is of the others.

    Raises:
        ConfigError: `_target_` can't be found, what it makes is no module, or it takes no context or no features and there are some.
    """
    named(config["_target_"], "network._target_")
    make = instantiate({**config, "_partial_": True}, _convert_="all")
    free = _free_arguments(make)
    given: dict[str, Any] = {}
    if "event_shape" in free:
        given["event_shape"] = event_shape
    if context_features:
        if "context_features" not in free:
            raise ConfigError(
                f"the data have a context of {context_features} features, but network._target_={config['_target_']} takes no "
                "context_features. Use network=mlp, or another network that does"
            )
        given["context_features"] = context_features
    if features is not None:
        if "features" not in free:
            raise ConfigError(
                f"{type(features).__name__} are for networks with an argument `features`, but network._target_={config['_target_']} takes "
                "none. Use network=mlp or network=concat_squash, or features=none"
            )
        given["features"] = features
    network = make(**given)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"network._target_={config['_target_']} made a {type(network).__name__}. It must name an nn.Module, called as "
            "net(t, x)"
        )
    _materialize(network, event_shape, context_features)
    return network


def _materialize(network: nn.Module, event_shape: tuple[int, ...], context_features: int) -> None:
    """Evaluate a network with lazy layers once, to give their parameters shapes."""
    if not any(is_lazy(parameter) for parameter in (*network.parameters(), *network.buffers())):
        return
    t, x = torch.zeros(()), torch.zeros(1, *event_shape)
    context = (torch.zeros(1, context_features),) if context_features else ()
    evaluated(network, t, x, lambda t, x: network(t, x, *context))


def _check_base(base: Distribution | None, transform: nn.Module) -> None:
    """Check that particles without centre of mass get a density on their subspace.

    Raises:
        ConfigError: the base is on the whole space, or the density is a score's.
    """
    if isinstance(transform, MeanFreeScale) and not (isinstance(base, OnSubspace) and base.mean_free):
        raise ConfigError(
            "these data are particles with centre of mass zero, on which a density of the whole space is no density. Use task=flow or "
            "task=flow_matching with base=mean_free, and a network that keeps the centre of mass, such as hollow_egnn_mean_free"
        )


def _build_base(config: Mapping[str, Any] | None, event_shape: tuple[int, ...]) -> Distribution | None:
    return None if config is None else instantiate({**config, "event_shape": list(event_shape)}, _convert_="all")


def _build_features(config: Mapping[str, Any], event_shape: tuple[int, ...]) -> nn.Module | None:
    """Build the features by which the network sees x, with the event shape or the manifold that their class asks for.

    Raises:
        ConfigError: they are those of a manifold, and there is none.
    """
    features = config.get("features")
    if features is None:
        return None
    named(features["_target_"], "features._target_")
    free = _free_arguments(instantiate({**features, "_partial_": True}, _convert_="all"))
    given = {"event_shape": list(event_shape), "manifold": config.get("manifold")}
    if "manifold" in free and given["manifold"] is None:
        raise ConfigError(
            f"features._target_={features['_target_']} are for data on a manifold, but these are not; use features=fourier or features=none"
        )
    return made("features", {**features, **{name: it for name, it in given.items() if name in free}}, nn.Module)


def _build_sde(
    config: Mapping[str, Any] | None, event_shape: tuple[int, ...], manifold: Mapping[str, Any] | None
) -> SDE | None:
    """Build an SDE, with the event shape of the data or their manifold.

    Raises:
        ConfigError: the SDE leaves the manifold of the data, or is one of manifolds and there is none.
    """
    target = None if config is None else config.get("_target_")
    moves = target is not None and "manifold" in inspect.signature(named(target, "sde._target_")).parameters
    if manifold is not None and not moves:
        raise ConfigError(
            f"sde._target_={target or 'none'} leaves the manifold of the data, {manifold}; use sde=brownian"
        )
    if config is None:
        return None
    if moves and manifold is None:
        raise ConfigError("sde=brownian is for data on a manifold, but these are not; use sde=vp")
    given = {"manifold": manifold} if moves else {"event_shape": list(event_shape)}
    return made("sde", {**config, **given}, SDE)


def _build_sampler(config: Mapping[str, Any] | None, sde: SDE | None, event_shape: tuple[int, ...]) -> Sampler | None:
    """Build a sampler, with the SDE or the event shape that its class asks for.

    Raises:
        ConfigError: it samples SDEs and there is none, or the other way round.
    """
    if config is None:
        if sde is None:
            raise ConfigError("a score without SDE has no probability flow. Use sampler=annealed_langevin")
        return None
    make = instantiate({**config, "_partial_": True}, _convert_="all")
    if "sde" in _free_arguments(make):
        if sde is None:
            raise ConfigError(f"{config['_target_']} needs an SDE. Use sampler=annealed_langevin, or sde=vp")
        return make(sde=sde)
    if sde is not None:
        raise ConfigError(f"{config['_target_']} is for scores without SDE. Use sampler=reverse_sde, or sde=none")
    return make(event_shape=event_shape)


def _free_arguments(make: functools.partial) -> set[str]:
    try:
        return set(inspect.signature(make.func).parameters) - set(make.keywords)
    except ValueError:  # some built-in types have no signature
        return set()

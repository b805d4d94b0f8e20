"""The data of a run, divflow's or your own data module, and what a density must know of them."""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L
from hydra.utils import get_object, instantiate

from divflow.data.batch import Keys, check_keys
from divflow.data.module import TensorDataModule
from divflow.data.own import check_loaders, first_parts, is_features
from divflow.errors import checked_event_shape
from divflow.flow.transforms import Affine, Transform
from divflow.manifolds import Manifold
from divflow.operators.context import named_tensors
from divflow.saved.named import ConfigError, made

__all__ = ["build_data", "data_description", "manifold_of"]


def build_data(settings: Mapping[str, Any]) -> tuple[L.LightningDataModule, Keys | None]:
    """Build the data module of a config; return it with `keys`, which names the parts of its batches.

    Args:
        settings: plain values: a class by `_target_`, its arguments, and `keys`, which is no argument of it.

    Raises:
        ConfigError: an argument is missing.
        DataError: the result is no data module with all three loaders, or the keys do not name x.
    """
    if missing := [name for name, value in settings.items() if value == "???"]:
        raise ConfigError(f"data.{missing[0]} must be given. Add data.{missing[0]}=...")
    keys = settings.get("keys")
    check_keys(keys)
    data = instantiate({name: value for name, value in settings.items() if name != "keys"}, _convert_="all")
    check_loaders(data)
    return data, keys


def data_description(data: L.LightningDataModule, keys: Keys | None, network: Mapping[str, Any]) -> dict[str, Any]:
    """Describe, as plain values, what a density must know of its training data.

    For your own data module these are its attributes `event_shape` and `transform`, if it has them. Otherwise the shapes are those of
    the first training batch, and the data are not transformed.

    Args:
        data: data module, divflow's or any other.
        keys: where the parts of its batches are.
        network: config of the network, which may ask for the number of context features.

    Raises:
        DataError: a batch can't be read.
        ConfigError: divflow's networks do not take the context.
    """
    if not isinstance(data, TensorDataModule):
        return _own(data, keys, network)
    found: dict[str, Any] = {"event_shape": list(data.event_shape), "transform": data.transform.config()}
    if data.context_features:
        found["context_features"] = data.context_features
    if data.context_transform is not None:
        found["context_transform"] = data.context_transform.config()
    if data.coordinates is not None:
        found["coordinates"] = data.coordinates.config()
    if data.context_range is not None:
        found["context_range"] = data.context_range
    return found | {name: list(getattr(data, name)) for name in ("columns", "context_columns") if hasattr(data, name)}


def manifold_of(data: L.LightningDataModule, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The manifold of a run as plain values: that of its data, or the one given by the config; None for all of space.

    Args:
        data: data module, divflow's or any other.
        given: config of the manifold, or None.

    Raises:
        ConfigError: both, and they are two.
    """
    own = getattr(data, "manifold", None)
    if not isinstance(own, Manifold):
        return None if given is None else dict(given)
    if given is not None and made("manifold", given, Manifold) != own:
        raise ConfigError(
            f"the data lie on {own}, but manifold={made('manifold', given, Manifold)}; leave the manifold out"
        )
    return own.config()


def _own(data: L.LightningDataModule, keys: Keys | None, network: Mapping[str, Any]) -> dict[str, Any]:
    parts = first_parts(data, keys)
    shape = checked_event_shape(getattr(data, "event_shape", tuple(parts.x.shape[1:])))
    own = getattr(data, "transform", None)
    transform = own if isinstance(own, Transform) else Affine()  # others are of single samples, as torchvision's
    found: dict[str, Any] = {"event_shape": list(shape), "transform": transform.config()}
    if parts.context is None:
        return found
    features = parts.context.shape[1] if is_features(parts.context) else 0
    ours, asks = network["_target_"].startswith("divflow."), _asks_for_features(network)
    if ours and not features:
        received = ", ".join(
            f"{place} {leaf.dtype} {tuple(leaf.shape)}" for place, leaf in named_tensors(parts.context)
        )
        raise ConfigError(
            f"the networks of divflow take a context of floating-point features (k, n), but the batches have {received}. Use network=custom "
            "with a velocity(t, x, context) of your own, or leave the context out by data.keys"
        )
    return found | ({"context_features": features} if ours or (asks and features) else {})


def _asks_for_features(network: Mapping[str, Any]) -> bool:
    try:
        return "context_features" in inspect.signature(get_object(network["_target_"])).parameters
    except (ImportError, ValueError, TypeError):  # which is reported when the network is built
        return False

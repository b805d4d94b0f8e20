"""What the commands on a trained density share: the density, the data that it was trained on, and where it runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from hydra.utils import get_class, get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from divflow.adapters.foreign import AdaptedFlow
from divflow.arguments import check_count, checked_range
from divflow.build import ConfigError, build_ways, check_paths
from divflow.checkpoint import CheckpointError, read_checkpoint, rebuild, which_weights
from divflow.density import FlowDensity, UnnormalizedDensity
from divflow.flow import ContinuousFlow
from divflow.transforms import Affine

if TYPE_CHECKING:  # it imports Lightning, and mistakes are told before
    from lightning.fabric import Fabric

__all__ = [
    "Trained",
    "check_least",
    "check_model",
    "data_config",
    "launched",
    "load_trained",
    "named_device",
    "scaled_to_model",
]

_OF_DATA = ("divflow.data.", "divflow.energies.")


@dataclass(frozen=True)
class Trained:
    """A trained density, in eval mode.

    Attributes:
        density: of the data.
        name: what it is, with the weights that were taken, in words.
        columns: the names of the data's columns, where they are known.
    """

    density: FlowDensity | UnnormalizedDensity
    name: str
    columns: list[str] | None


def check_model(config: DictConfig) -> None:
    """Refuse what can be seen to be wrong at once.

    Raises:
        ConfigError: a value is missing; no density is named, or two; a checkpoint that is not there.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{', '.join(missing)} must be given: {missing[0]}=...")
    if (config.ckpt_path is None) == (config.model._target_ is None):
        raise ConfigError(
            "give either ckpt_path=..., a checkpoint such as outputs/latest/checkpoints/best.ckpt, or "
            "model._target_=..., a function that makes a density"
        )
    check_paths({"ckpt_path": config.ckpt_path, "data.path": config.data.get("path")})
    if config.batch_size is not None:
        check_least("batch_size", config.batch_size, 1)
    if config.seed is not None:
        check_least("seed", config.seed, 0)


def check_least(name: str, value: Any, least: int) -> None:
    """`check_count` of a setting.

    Raises:
        ConfigError: naming the setting.
    """
    try:
        check_count(name, value, least)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_trained(config: DictConfig) -> Trained:
    """The density of a checkpoint, or that of a function of one's own, evaluated as the config says.

    Args:
        config: with `ckpt_path` and `allow`, or `model`; and `estimator`, `likelihood`, `solver`, as far as
            they shall be others than those the density has.

    Raises:
        CheckpointError: a checkpoint that can't be read or is not allowed.
        ConfigError: what the function made is no density.
    """
    if config.ckpt_path is None:
        density, name, columns = _made(config.model), config.model._target_, None
    else:
        checkpoint = read_checkpoint(Path(config.ckpt_path).expanduser())
        density = rebuild(checkpoint, config.ckpt_path, _classes(config.allow))
        name = which_weights(checkpoint, config.ckpt_path)
        columns = density.columns or _saved_data(config).get("columns")
    ways = build_ways(_plain(config))
    if ways:
        if not isinstance(density, FlowDensity):
            raise ConfigError(f"{name} is a score without SDE, which has no flow: it takes no {', '.join(ways)}")
        density = density.with_flow(density.flow.replace(**ways))
    return Trained(density.eval(), name, None if columns is None else [str(column) for column in columns])


def _classes(names: Iterable[str]) -> list[type]:
    try:
        return [get_class(name) for name in names]
    except (ImportError, ValueError) as error:
        raise ConfigError(f"allow must name classes, such as [my_module.Velocity]: {error}") from error


def data_config(config: DictConfig, columns: list[str] | None) -> dict[str, Any]:
    """The data that are named, else those of the run, with what is named of them changed.

    Args:
        config: with `data`: a whole choice, or single settings such as `+data.path=other.csv`.
        columns: those the density was trained on, which a table must have.

    Raises:
        ConfigError: neither are known, or other columns are asked for.
        CheckpointError: the run's data are of a class that is neither divflow's nor allowed.
    """
    named = _plain(config.data)
    found = named if "_target_" in named else _saved_data(config) | named
    if "_target_" not in found:
        raise ConfigError(
            "which data is not known: there is no config.yaml in the folder of the checkpoint's run; give data=..., such as "
            "data=table data.path=measurements.csv"
        )
    if columns is None or "columns" not in found or Path(found["path"]).suffix == ".npy":  # which has no names
        return found
    asked = [str(column) for column in found["columns"] or columns]
    if set(asked) != set(columns):
        raise ConfigError(
            f"data.columns={asked} are not those of the training, {columns}: "
            f"{', '.join(sorted(set(asked) ^ set(columns)))} in one of them only"
        )
    return found | {"columns": columns}


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _saved_data(config: DictConfig) -> dict[str, Any]:
    """The data in the `config.yaml` of the checkpoint's run; nothing where there is none."""
    if config.ckpt_path is None:
        return {}
    file = Path(config.ckpt_path).expanduser().absolute().parent.parent / "config.yaml"
    if not file.is_file():
        return {}
    data = _plain(OmegaConf.load(file).data)
    _check_data_targets(data, set(config.allow), file)
    return data


def _check_data_targets(data: Any, allowed: set[str], file: Path) -> None:
    """A folder from elsewhere runs no code of its own: its data, and their energies, are divflow's, or named in `allow`."""
    if isinstance(data, list):
        data = dict(enumerate(data))
    if not isinstance(data, Mapping):
        return
    target = data.get("_target_")
    if target is not None and target not in allowed and not _is_ours(target):
        raise CheckpointError(
            f"{file} asks for {target!r}, which is none of divflow's data or energies; if you trust it, allow=[{target}]"
        )
    for value in data.values():
        _check_data_targets(value, allowed, file)


def _is_ours(target: Any) -> bool:
    """Whether it names a class or function of divflow's data or energies."""
    if not isinstance(target, str) or not target.startswith(_OF_DATA):
        return False
    try:
        found = get_object(target)
    except ImportError:
        return False
    return getattr(found, "__module__", "").startswith(_OF_DATA)  # a module has none


def _made(model: DictConfig) -> FlowDensity | UnnormalizedDensity:
    made: nn.Module = instantiate(model, _convert_="all")
    if isinstance(made, ContinuousFlow):
        made = FlowDensity(made, Affine())
    if isinstance(made, FlowDensity):
        made.watch_units = not isinstance(made.flow, AdaptedFlow)  # which watches them by itself
    if not isinstance(made, FlowDensity | UnnormalizedDensity):
        raise ConfigError(
            f"model._target_={model._target_} made a {type(made).__name__}; it must make a ContinuousFlow or a density of "
            "divflow.density"
        )
    return made


def scaled_to_model(
    density: FlowDensity, data_range: Sequence[float] | None, levels: int | None, name: str
) -> FlowDensity:
    """The density of discrete data, which are scaled to lie between 0 and 1, under a model of data in another range.

    Args:
        density: of the data as the model takes them.
        data_range: what the model was trained on, [low, high]; that which an adapter was given if None.
        levels: of discrete data; None for others.
        name: of the model, for messages.

    Raises:
        ConfigError: a range that is none; one for data that are not discrete, or for a density with a transform of its own.
    """
    try:
        given = None if data_range is None else checked_range("data_range", data_range)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    known = given or getattr(density.flow, "data_range", None)
    bare = type(density) is FlowDensity and density.transform.config() == Affine().config()
    if known is None or (given is None and not (bare and levels)):
        return density
    if levels is None:
        raise ConfigError(
            f"data_range={list(known)} says where the pixels of a model lie, for discrete data between 0 and 1, but these data are not "
            "discrete: bring them to the model's units by the transform of a FlowDensity in model._target_"
        )
    if not bare:
        raise ConfigError(
            f"{name} has a transform of its own from the data to its model, which data_range={list(known)} would be beside; leave it out"
        )
    scaled = FlowDensity(density.flow, Affine.between((0, 1), known)).train(density.training)
    scaled.columns, scaled.watch_units = density.columns, density.watch_units
    return scaled


def launched(device: DictConfig) -> "Fabric":
    """The processes of a command: those that `device` names, as in training; this one is one of them.

    Raises:
        ConfigError: a GPU that is not there, or another precision than `32-true`.
    """
    from lightning.fabric import Fabric

    accelerator = named_device(device, several=True).type if device.accelerator == "auto" else device.accelerator
    fabric = Fabric(
        accelerator=accelerator, strategy=device.strategy, devices=device.devices, num_nodes=device.num_nodes
    )
    fabric.launch()
    return fabric


def named_device(device: DictConfig, *, several: bool = False) -> torch.device:
    """The device that is named, in this process.

    Raises:
        ConfigError: several processes, unless these are taken, a GPU that is not there, or another precision.
    """
    if not several and (device.strategy != "auto" or device.devices not in ("auto", 1) or device.num_nodes != 1):
        raise ConfigError("this command runs in one process, on one device: device=auto, device=cpu or device=gpu")
    if device.precision != "32-true":
        raise ConfigError(f"device.precision={device.precision} is for training; this command takes 32-true")
    there = torch.cuda.is_available()
    if device.accelerator == "gpu" and not there:
        raise ConfigError("device=gpu asks for a GPU, but torch sees none; use device=cpu")
    return torch.device("cuda" if there and device.accelerator in ("auto", "gpu") else "cpu")

"""Shared parts of the commands on a trained density: the density, the data that it was trained on, and the device."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from divflow.adapters.foreign import AdaptedFlow
from divflow.errors import DivflowError, check_count, checked_range
from divflow.flow import ContinuousFlow, FlowDensity
from divflow.flow.transforms import Affine, Rounded
from divflow.runs.settings import check_paths
from divflow.saved.build import ConfigError, build_ways
from divflow.saved.checkpoint import (
    CheckpointError,
    lacking_targets,
    named_classes,
    read_checkpoint,
    rebuild,
    which_weights,
)
from divflow.saved.named import named
from divflow.score import UnnormalizedDensity

if TYPE_CHECKING:  # it imports Lightning, and mistakes are reported first
    from lightning.fabric import Fabric

__all__ = [
    "Trained",
    "check_least",
    "check_model",
    "data_config",
    "launched",
    "load_trained",
    "named_device",
    "names_other_data",
    "scaled_to_model",
    "warn_of_changed_table",
]

# Names of columns, which may look like anything.
_NAMES = ("columns", "context_columns")
_OF_DATA = ("divflow.data.", "divflow.energies.")


@dataclass(frozen=True)
class Trained:
    """A trained density, in evaluation mode.

    Attributes:
        density: density of the data.
        name: description of the checkpoint and of the weights that were taken.
        columns: names of the data's columns, if they are known.
        data_states: what the data modules of the training left in its checkpoint, by the names of their classes.
    """

    density: FlowDensity | UnnormalizedDensity
    name: str
    columns: list[str] | None
    data_states: Mapping[str, Mapping[str, Any]]

    @property
    def whole(self) -> list[str]:
        """Names of the columns of whole numbers, to which samples are rounded."""
        entries = next((it.entries.tolist() for it in self.density.modules() if isinstance(it, Rounded)), [])
        return [name for name, it in zip(self.columns or [], entries, strict=False) if it]


def check_model(config: DictConfig) -> None:
    """Refuse wrong settings of the model before anything is loaded.

    Raises:
        ConfigError: a value is missing, no density or two are named, or the checkpoint does not exist.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{', '.join(missing)} must be given. Add {missing[0]}=...")
    if (config.ckpt_path is None) == (config.model._target_ is None):
        raise ConfigError(
            "a trained density must be given, and once. Give either ckpt_path=..., such as outputs/latest/checkpoints/best.ckpt, or "
            "model._target_=..., a function that makes a density"
        )
    check_paths({"ckpt_path": config.ckpt_path, "data.path": config.data.get("path")})
    if config.batch_size is not None:
        check_least("batch_size", config.batch_size, 1)
    if config.seed is not None:
        check_least("seed", config.seed, 0)


def check_least(name: str, value: Any, least: int) -> None:
    """Check a setting by `check_count`.

    Raises:
        ConfigError: naming the setting.
    """
    try:
        check_count(name, value, least)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_trained(config: DictConfig, with_data: bool = True) -> Trained:
    """Load the density of a checkpoint, or build that of your own function, evaluated as the config describes.

    Args:
        config: with `ckpt_path` and `allow`, or `model`, and with `estimator`, `likelihood` and `solver` if they
            replace those of the density.
        with_data: whether the data that it was trained on are to be built, too, and so must be allowed.

    Raises:
        CheckpointError: a checkpoint can't be read or is not allowed.
        ConfigError: the function did not make a density.
    """
    ways = build_ways(_plain(config))
    if config.ckpt_path is None:
        density, name, columns, states = _made(config.model), config.model._target_, None, {}
    else:
        checkpoint = read_checkpoint(Path(config.ckpt_path).expanduser(), weights=config.weights)
        allow = _classes(_allowed(config.allow))
        _check_classes(config, checkpoint.get("divflow", {}), named_classes(allow), with_data)
        density = rebuild(checkpoint, config.ckpt_path, allow)
        name = which_weights(checkpoint, config.ckpt_path)
        columns = density.columns or _data_of_run(config).get("columns")
        states = {key: it for key, it in checkpoint.items() if isinstance(it, Mapping) and "order_seed" in it}
    if ways:
        if not isinstance(density, FlowDensity):
            raise ConfigError(f"{name} is a score without SDE, which has no flow. Leave {', '.join(ways)} out")
        density = density.with_flow(density.flow.replace(**ways))
    return Trained(density.eval(), name, None if columns is None else [str(column) for column in columns], states)


def _allowed(names: Any) -> list[str]:
    """Names in `allow`, of which a string is one."""
    return [names] if isinstance(names, str) else [str(name) for name in names or []]


def _classes(names: Iterable[str]) -> list[type]:
    """Classes among the named classes and functions; functions make data."""
    found = [named(name, "allow") for name in names]
    if odd := [repr(it) for it in found if not callable(it)]:
        raise ConfigError(f"allow must name classes, such as [my_module.Velocity], but names {', '.join(odd)}")
    return [it for it in found if isinstance(it, type)]


def _check_classes(config: DictConfig, made_of: Mapping[str, Any], allowed: Mapping[str, type], data: bool) -> None:
    """Refuse classes that are not allowed, those of the density and of its training data at once."""
    lacking = lacking_targets({name: it for name, it in made_of.items() if name not in _NAMES}, allowed)
    if data and "_target_" not in config.data:
        lacking |= _lacking_of_data(_data_of_run(config), set(_allowed(config.allow)), "data of its config.yaml")
    _require_none(lacking, config)


def _require_none(lacking: Mapping[str, str], config: DictConfig) -> None:
    if lacking:
        asked = ", ".join(f"{name!r} (at {where})" for name, where in lacking.items())
        raise CheckpointError(
            f"{config.ckpt_path} names {asked}, which are not divflow's own for that place. If you trust them, "
            f"add allow=[{','.join([*_allowed(config.allow), *lacking])}]"
        )


def names_other_data(config: DictConfig) -> bool:
    """Whether the config may name other data than those of the run."""
    return "_target_" in config.data or "path" in config.data


def warn_of_changed_table(config: DictConfig, trained: Trained) -> None:
    """Warn if the run's own table, if it is there, has other rows than in training; what needs no data continues without it."""
    from divflow.data.split import describe_changes
    from divflow.data.table import all_rows

    state = trained.data_states.get("Table")
    if state is None or names_other_data(config):
        return
    try:
        settings = data_config(config, trained)
        _, digests = all_rows(**{name: value for name, value in settings.items() if name != "_target_"})
    except DivflowError:
        return
    if changes := describe_changes(state, digests):
        warnings.warn(changes, stacklevel=2)


def data_config(config: DictConfig, trained: Trained) -> dict[str, Any]:
    """Settings of the data that are named, or else of the run's data, with the named changes.

    Args:
        config: with `data`, a whole choice or single settings such as `+data.path=other.csv`.
        trained: density whose columns, context and discrete columns a table must have.

    Raises:
        ConfigError: no data are known, or other columns are asked for.
        CheckpointError: the run's data are of a class that is neither divflow's nor allowed.
    """
    named = _plain(config.data)
    found = named if "_target_" in named else _saved_data(config) | named
    if "_target_" not in found:
        raise ConfigError(
            "the data are not known, because the folder of the checkpoint's run has no config.yaml. Give data=..., such as "
            "data=table data.path=measurements.csv"
        )
    columns, density = trained.columns, trained.density
    if columns is None or "columns" not in found or Path(found["path"]).suffix.lower() == ".npy":  # which has no names
        return found
    given = getattr(density, "context_columns", None) or []
    kept = {"context": given, "discrete": trained.whole}
    for name, of_training in {"columns": columns, **kept}.items():
        asked = _names(found.get(name)) or of_training
        asked = [it for it in asked if it not in given] if name == "columns" else asked
        if set(asked) != set(of_training):
            raise ConfigError(
                f"data.{name}={asked} are not those of the training, {of_training}: "
                f"{', '.join(sorted(set(asked) ^ set(of_training)))} in one of them only"
            )
    return found | {"columns": columns} | {name: names for name, names in kept.items() if names}


def _names(names: Any) -> list[str]:
    return [str(names)] if isinstance(names, str | int) else [str(name) for name in names or []]


def _plain(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _saved_data(config: DictConfig) -> dict[str, Any]:
    """Data in the `config.yaml` of the checkpoint's run; empty if there is none."""
    data = _data_of_run(config)
    _require_none(_lacking_of_data(data, set(_allowed(config.allow)), "data of its config.yaml"), config)
    return data


def _data_of_run(config: DictConfig) -> dict[str, Any]:
    if config.ckpt_path is None:
        return {}
    file = Path(config.ckpt_path).expanduser().absolute().parent.parent / "config.yaml"
    return _plain(OmegaConf.load(file).data) if file.is_file() else {}


def _lacking_of_data(data: Any, allowed: set[str], place: str) -> dict[str, str]:
    """Classes of the run's data and energies that are neither divflow's nor in `allow`, so that a foreign folder runs no code."""
    if isinstance(data, list):
        data = dict(enumerate(data))
    if not isinstance(data, Mapping):
        return {}
    target, found = data.get("_target_"), {}
    if target is not None and target not in allowed and not _is_ours(target):
        found[str(target)] = place
    for key, value in data.items():
        found |= _lacking_of_data(value, allowed, f"{place}, {key}")
    return found


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
    named(model._target_, "model._target_")
    made: nn.Module = instantiate(model, _convert_="all")
    if isinstance(made, ContinuousFlow):
        made = FlowDensity(made, Affine())
    if isinstance(made, FlowDensity):
        made.watch_units = not isinstance(made.flow, AdaptedFlow)  # which watches them by itself
    if not isinstance(made, FlowDensity | UnnormalizedDensity):
        raise ConfigError(
            f"model._target_={model._target_} made a {type(made).__name__}. It must make a ContinuousFlow or a density of "
            "divflow.flow or divflow.score"
        )
    return made


def scaled_to_model(
    density: FlowDensity, data_range: Sequence[float] | None, levels: int | None, name: str
) -> FlowDensity:
    """Convert the density of a model to that of discrete data, which are scaled to [0, 1].

    Args:
        density: density of the data as the model takes them.
        data_range: range that the model was trained on, [low, high]; that of the adapter if None.
        levels: number of values of discrete data; None for others.
        name: of the model, for messages.

    Raises:
        ConfigError: the range is none, the data are not discrete, or the density has its own transform.
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
            f"data_range={list(known)} gives the range of a model's pixels, for discrete data in [0, 1], but these data are not "
            "discrete. Convert them to the model's units by the transform of a FlowDensity in model._target_"
        )
    if not bare:
        raise ConfigError(
            f"{name} has its own transform from the data to its model, with which data_range={list(known)} would conflict. Leave data_range out"
        )
    scaled = FlowDensity(density.flow, Affine.between((0, 1), known)).train(density.training)
    return density.like_this(scaled)


def launched(device: DictConfig) -> "Fabric":
    """Start the processes of a command that `device` names, as in training; this process is one of them.

    Raises:
        ConfigError: there is no GPU where one is named, or the precision is not `32-true`.
    """
    from lightning.fabric import Fabric

    accelerator = named_device(device, several=True).type if device.accelerator == "auto" else device.accelerator
    fabric = Fabric(
        accelerator=accelerator, strategy=device.strategy, devices=device.devices, num_nodes=device.num_nodes
    )
    fabric.launch()
    return fabric


def named_device(device: DictConfig, *, several: bool = False) -> torch.device:
    """Device that `device` names, in this process.

    Raises:
        ConfigError: several processes (unless supported), a GPU that is not there, or a precision other than `32-true`.
    """
    if not several and (device.strategy != "auto" or device.devices not in ("auto", 1) or device.num_nodes != 1):
        raise ConfigError("this command runs in one process, on one device. Use device=auto, device=cpu or device=gpu")
    if device.precision != "32-true":
        raise ConfigError(f"device.precision={device.precision} is for training. Leave it at 32-true for this command")
    there = torch.cuda.is_available()
    if device.accelerator == "gpu" and not there:
        raise ConfigError("device=gpu asks for a GPU, but torch sees none. Use device=cpu")
    return torch.device("cuda" if there and device.accelerator in ("auto", "gpu") else "cpu")

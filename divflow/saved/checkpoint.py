"""Loading trained densities: rebuilt from the plain values in a checkpoint, without running code from it."""

import importlib
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from divflow.errors import DivflowError
from divflow.flow import FlowDensity
from divflow.manifolds import Coordinates
from divflow.saved.build import ConfigError, build_density
from divflow.saved.named import made, named
from divflow.score import UnnormalizedDensity

__all__ = [
    "CheckpointError",
    "check_state",
    "check_targets",
    "folder_instead",
    "init_weights",
    "lacking_targets",
    "load",
    "load_state",
    "named_classes",
    "read_checkpoint",
    "rebuild",
    "which_weights",
]


# Names of weights to start from.
_OF_OTHER_DATA = ", the standardization of its data included, which is not that of these data"


class CheckpointError(DivflowError, RuntimeError):
    """A checkpoint can't be read, names classes that are not allowed, or is of another architecture."""


def load(
    path: str | Path,
    *,
    allow: Iterable[type | str] = (),
    map_location: str | torch.device = "cpu",
    weights: str = "averaged",
) -> FlowDensity | UnnormalizedDensity:
    """Load a trained density from a checkpoint, in evaluation mode.

    It has `log_prob` and `sample`, and `score` if it was trained by score matching; a score without SDE has no `log_prob`. All
    values are in the units of the data. `columns` names the columns of the data, if they have names, and `coordinates` turns points of a
    manifold into the numbers of their file.

    No code in the file runs: it is read with `weights_only=True`, and only classes of divflow, of torch.nn and those in `allow` are
    built.

    Args:
        path: checkpoint that `divflow train` wrote, such as `checkpoints/best.ckpt`.
        allow: further classes that may be built, such as your own network, or their names, `["my_module.Velocity"]`, which are imported.
        map_location: device of the density.
        weights: "averaged" takes the averaged weights, if training averaged them, by which validation and test evaluate a run.
            "current" takes those from which training resumes.

    Returns:
        A `FlowDensity`, `ScoreDensity` or `UnnormalizedDensity`.

    Raises:
        CheckpointError: there is no such file, divflow did not write it, it names a class that is not allowed, or is of another
            architecture.
        ConfigError: there are no such weights, or `allow` has something else than classes and names of classes.

    Example:
        density = divflow.load("outputs/latest/checkpoints/best.ckpt")
        density.log_prob(x)
        density.sample(1000)
    """
    with torch.device("cpu"):  # whatever torch's default device is
        density = rebuild(read_checkpoint(path, map_location, weights), path, allow)
    return density.to(map_location)


def rebuild(
    checkpoint: Mapping[str, Any], path: str | Path, allow: Iterable[type | str] = ()
) -> FlowDensity | UnnormalizedDensity:
    """Build the density of a checkpoint that has been read, in evaluation mode; `path` is for messages.

    Raises:
        CheckpointError: as `load`.
    """
    if "divflow" not in checkpoint:
        raise CheckpointError(
            f"{path} has no description of a density: a task without config wrote it, not train.py. "
            "Build the density yourself and use load_state_dict"
        )
    config = dict(checkpoint["divflow"])
    # Names alone, which may look like anything.
    columns, given = config.pop("columns", None), config.pop("context_columns", None)
    check_targets(config, named_classes(allow))
    coordinates = config.pop("coordinates", None)
    try:
        density = build_density(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has an incomplete description of a density: {type(error).__name__}: {error}"
        ) from error
    load_state(density, _density_state(checkpoint), path)
    density.columns = columns
    density.coordinates = None if coordinates is None else made("coordinates", coordinates, Coordinates)
    if isinstance(density, FlowDensity):
        density.watch_units, density.context_columns = True, given
        density.context_range = config.get("context_range")
    return density.eval()


def named_classes(allow: Iterable[type | str]) -> dict[str, type]:
    """Classes by the names under which checkpoints name them.

    Args:
        allow: classes, or names of classes, which are imported.

    Raises:
        ConfigError: something else is given, or a name can't be found.
    """
    listed: Any = [allow] if isinstance(allow, str) or not isinstance(allow, Iterable) else allow
    found = [named(it, "allow") if isinstance(it, str) else it for it in listed]
    if odd := [it for it in found if not isinstance(it, type)]:
        what = f"the module {odd[0].__name__}" if isinstance(odd[0], ModuleType) else repr(odd[0])
        raise ConfigError(
            f"allow takes classes, such as [my_module.Velocity], but is given {what}. Give the class itself"
        )
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in found}


def which_weights(checkpoint: Mapping[str, Any], path: str | Path) -> str:
    """Describe what `load` takes from a checkpoint: `best.ckpt, averaged weights of step 1400`."""
    taken = checkpoint.get("weights", "averaged") if "averaging_state" in checkpoint else ""
    return f"{Path(path).name}, {taken} weights of step {checkpoint['global_step']}".replace("  ", " ")


def init_weights(density: nn.Module, path: str | Path, weights: str = "averaged") -> str:
    """Start a density of any task from the weights in another run's checkpoint: "averaged", if it averaged them, or "current".

    The weights include the transform of the data, so that training starts from the very density of that run; its standardization is
    kept, whatever the data are now.

    Returns:
        A description of what was taken, and whether it is the standardization of other data.

    Raises:
        CheckpointError: there is no such file, it is no checkpoint, or names or shapes differ; the message gives the first of them.
    """
    checkpoint = read_checkpoint(path, weights=weights)
    state = _density_state(checkpoint)
    of_data = ("transform.", "context_transform.")
    own = {name: value.clone() for name, value in density.state_dict().items() if name.startswith(of_data)}
    load_state(density, state, path)
    other = "" if all(torch.allclose(value, state[name]) for name, value in own.items()) else _OF_OTHER_DATA
    numbers = sum(value.numel() for value in state.values())
    return f"{which_weights(checkpoint, path)} ({numbers:,} numbers in {len(state)} tensors){other}"


def _density_state(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Part of a task's state that belongs to its density."""
    state = checkpoint.get("state_dict", {}).items()
    return {name.removeprefix("density."): value for name, value in state if name.startswith("density.")}


def read_checkpoint(
    path: str | Path, map_location: str | torch.device = "cpu", weights: str = "averaged"
) -> dict[str, Any]:
    """Read the values in a checkpoint: tensors and plain Python values, nothing else.

    Args:
        path: of the file.
        map_location: device of the tensors.
        weights: those to return as `state_dict`, "averaged" or "current"; they are the same if training did not average.

    Returns:
        The values by name.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
        ConfigError: there are no such weights.
    """
    if weights not in ("averaged", "current"):
        raise ConfigError(f"weights must be averaged or current, but is {weights!r}")
    if message := folder_instead(path):
        raise CheckpointError(message)
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path} (looked in {Path.cwd()})")
    try:
        with warnings.catch_warnings():  # torch remarks on the pickle protocol before it refuses
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # unpickling other bytes raises errors of almost any type
        others = [other for name in ("last.ckpt", "best.ckpt") if (other := Path(path).with_name(name)) != Path(path)]
        hint = "".join(f"; beside it is {other}" for other in others if zipfile.is_zipfile(other))
        raise CheckpointError(
            f"{path} is not a checkpoint of plain tensors and values: {_reason(error, path)}{hint}"
        ) from error
    _check_parts(checkpoint, path)
    if weights == "current" and "current_model_state" in checkpoint:
        checkpoint |= {"state_dict": checkpoint["current_model_state"], "weights": weights}
    return checkpoint


def folder_instead(path: str | Path) -> str:
    """What is wrong with the path of a checkpoint that is a folder, with the checkpoints in it; empty if it is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return ""
    found = [str(it.relative_to(folder)) for it in sorted(folder.rglob("*.ckpt"))]
    if not found:
        return f"{path} is a folder, without any checkpoint in it. Name a checkpoint, such as checkpoints/best.ckpt in the folder of a run"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"{path} is a folder; its checkpoints are {', '.join(found[:5])}{more}. Name one of them, such as {folder / found[0]}"


def _reason(error: Exception, path: str | Path) -> str:
    """Why torch could not read a file, without its advice to run the code in it."""
    if not zipfile.is_zipfile(path):
        return "torch.save did not write it, or it is cut off"
    if "Weights only load failed" in str(error):
        return "it holds objects of other classes, whose code would run"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_parts(checkpoint: Any, path: str | Path) -> None:
    """Refuse what is no checkpoint of Lightning's.

    Raises:
        CheckpointError: naming what it is.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not the checkpoint of a run: it holds a {type(checkpoint).__name__}")
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise CheckpointError(
            f"{path} holds only the state of a module ({len(checkpoint)} tensors, such as {next(iter(checkpoint))!r}), not how to build "
            "it. Build the module and use load_state_dict"
        )
    step = checkpoint.get("global_step", "missing")
    wrong = [] if isinstance(step, int) else [f"global_step is {step!r}"]
    for name in ("state_dict", "current_model_state", "divflow"):
        state = checkpoint.get(name, "missing" if name == "state_dict" else {})
        tensors = name == "divflow" or (isinstance(state, Mapping) and all(map(torch.is_tensor, state.values())))
        if not isinstance(state, Mapping) or not tensors:
            shown = state if isinstance(state, str) else f"a {type(state).__name__}"
            wrong.append(f"{name} is {shown}, not {'settings' if name == 'divflow' else 'tensors'} by name")
    if wrong:
        raise CheckpointError(f"{path} is not the checkpoint of a run: its {'; its '.join(wrong)}")


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Load a state into a module, after `check_state`."""
    check_state(module, state, path)
    module.load_state_dict(state)


def check_state(module: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Refuse a state that does not match the module, before anything is changed.

    Raises:
        CheckpointError: names or shapes differ; the message gives the first of them.
    """
    own = module.state_dict()
    differences = [f"{name} is missing" for name in own.keys() - state.keys()]
    differences += [f"{name} is unknown" for name in state.keys() - own.keys()]
    differences += [
        f"{name} has shape {tuple(state[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another architecture: {'; '.join(sorted(differences)[:5])}"
            f"{f' and {len(differences) - 5} more' if len(differences) > 5 else ''}. Use the network and data settings "
            "that it was trained with, which config.yaml in the folder of its run holds"
        )


def check_targets(config: Any, allowed: Mapping[str, type], place: str = "divflow") -> None:
    """Refuse a config that would build anything but classes of divflow, modules of torch.nn and allowed classes.

    Raises:
        CheckpointError: naming all of these classes, and their places.
    """
    if lacking := lacking_targets(config, allowed, place):
        asked = ", ".join(f"{name!r} (at {where})" for name, where in lacking.items())
        raise CheckpointError(
            f"the checkpoint names {asked}, neither a class of divflow nor a module of torch.nn. If you trust it, "
            f"import it and pass load(..., allow=[{', '.join(lacking)}])"
        )


def lacking_targets(config: Any, allowed: Mapping[str, type], place: str = "divflow") -> dict[str, str]:
    """Classes that a config would build and that are neither divflow's, nor modules of torch.nn, nor allowed: places by names.

    Raises:
        CheckpointError: the config holds an interpolation.
    """
    found: dict[str, str] = {}
    if isinstance(config, Mapping):
        if "_target_" in config and not _is_allowed(config["_target_"], allowed):
            found[str(config["_target_"])] = place
        for key, value in config.items():
            found |= lacking_targets(value, allowed, f"{place}.{key}")
    elif isinstance(config, str):
        if "${" in config:
            raise CheckpointError(f"{place} holds an interpolation, {config!r}, which a checkpoint must not hold")
    elif isinstance(config, Sequence):
        for i, value in enumerate(config):
            found |= lacking_targets(value, allowed, f"{place}[{i}]")
    return found


def _is_allowed(target: Any, allowed: Mapping[str, type]) -> bool:
    if not isinstance(target, str):
        return False
    module, _, name = target.rpartition(".")
    # A class may be named by another module that has it, which is looked up only if it is already imported.
    if target in allowed or vars(sys.modules.get(module, sys)).get(name) in allowed.values():
        return True
    if not target.startswith(("divflow.", "torch.nn.")):
        return False
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    ours = isinstance(found, type) and found.__module__.startswith("divflow.")
    theirs = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("torch.nn.")
    return ours or theirs

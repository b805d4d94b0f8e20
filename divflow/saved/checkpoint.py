"""Bringing a trained density back: rebuilt from the plain values in its checkpoint, without running code from it."""

import importlib
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from divflow.errors import DivflowError
from divflow.flow import FlowDensity
from divflow.saved.build import ConfigError, build_density
from divflow.score import UnnormalizedDensity

__all__ = [
    "CheckpointError",
    "check_state",
    "check_targets",
    "init_weights",
    "lacking_targets",
    "load",
    "load_state",
    "named_classes",
    "read_checkpoint",
    "rebuild",
    "which_weights",
]


# Of weights to start from.
_OF_OTHER_DATA = ", the standardization of its data included, which is not that of these data"


class CheckpointError(DivflowError, RuntimeError):
    """A checkpoint can't be read, asks for classes that are not allowed, or is of another architecture."""


def load(
    path: str | Path,
    *,
    allow: Iterable[type] = (),
    map_location: str | torch.device = "cpu",
    weights: str = "averaged",
) -> FlowDensity | UnnormalizedDensity:
    """A trained density, in eval mode: `log_prob` and `sample`, and `score` if it was trained by score matching.

    Everything is in the units of its data, whose columns, where these have names, are `columns`; a score that was trained
    without an SDE has no `log_prob`.

    The file is read with `weights_only=True`, so no code in it runs, and the density is rebuilt from the names of
    classes in it only where these belong to divflow or torch.nn, or are given in `allow`.

    Args:
        path: a checkpoint that `train.py` wrote, such as `checkpoints/best.ckpt`.
        allow: further classes that may be built, such as a network of one's own.
        map_location: device to put it on.
        weights: "averaged" takes those where training averaged them, by which a run is judged; "current" the ones from
            which it goes on.

    Raises:
        CheckpointError: no such file, not one of divflow's, a class that is not allowed, or another architecture.
        ConfigError: no such weights.

    Example:
        density = divflow.load("outputs/latest/checkpoints/best.ckpt")
        density.log_prob(x)
        density.sample(1000)
    """
    with torch.device("cpu"):  # where its tensors are made is not torch's default device's to say
        density = rebuild(read_checkpoint(path, map_location, weights), path, allow)
    return density.to(map_location)


def rebuild(
    checkpoint: Mapping[str, Any], path: str | Path, allow: Iterable[type] = ()
) -> FlowDensity | UnnormalizedDensity:
    """The density of a checkpoint that has been read, in eval mode; `path` is for messages.

    Raises:
        CheckpointError: as `load`.
    """
    if "divflow" not in checkpoint:
        raise CheckpointError(
            f"{path} has no description of a density: a task without config wrote it, not train.py. "
            "Build the density yourself and use load_state_dict"
        )
    config = dict(checkpoint["divflow"])
    # Only names, whatever they look like.
    columns, given = config.pop("columns", None), config.pop("context_columns", None)
    check_targets(config, named_classes(allow))
    try:
        density = build_density(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has an incomplete description of a density: {type(error).__name__}: {error}"
        ) from error
    load_state(density, _density_state(checkpoint), path)
    density.columns = columns
    if isinstance(density, FlowDensity):
        density.watch_units, density.context_columns = True, given
    return density.eval()


def named_classes(allow: Iterable[type]) -> dict[str, type]:
    """Classes by the names that a checkpoint has for them."""
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in allow}


def which_weights(checkpoint: Mapping[str, Any], path: str | Path) -> str:
    """What `load` takes from a checkpoint, in words: `best.ckpt, averaged weights of step 1400`."""
    taken = checkpoint.get("weights", "averaged") if "averaging_state" in checkpoint else ""
    return f"{Path(path).name}, {taken} weights of step {checkpoint['global_step']}".replace("  ", " ")


def init_weights(density: nn.Module, path: str | Path, weights: str = "averaged") -> str:
    """Start a density, of whatever task, from the weights in another run's checkpoint: "averaged", if it averaged them, or "current".

    The data's transform is among them, so that it starts as the very density of that run: its standardization stays, whatever
    the data are now.

    Returns:
        What was taken, in words, and whether it is the standardization of other data.

    Raises:
        CheckpointError: no such file, not a checkpoint, or names or shapes that differ, with the first of them.
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
    """The state of the density in a task's."""
    state = checkpoint.get("state_dict", {}).items()
    return {name.removeprefix("density."): value for name, value in state if name.startswith("density.")}


def read_checkpoint(
    path: str | Path, map_location: str | torch.device = "cpu", weights: str = "averaged"
) -> dict[str, Any]:
    """The values in a checkpoint: tensors and plain Python ones, nothing else.

    Args:
        path: of the file.
        map_location: device of its tensors.
        weights: which stand in its `state_dict`, "averaged" or "current"; where training averaged none these are the same.

    Raises:
        CheckpointError: no such file, or one that holds something else.
        ConfigError: no such weights.
    """
    if weights not in ("averaged", "current"):
        raise ConfigError(f"weights must be averaged or current, but is {weights!r}")
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path} (looked in {Path.cwd()})")
    try:
        with warnings.catch_warnings():  # torch remarks on the pickle protocol before it refuses
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # of other bytes, unpickling makes errors of almost any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        others = [other for name in ("last.ckpt", "best.ckpt") if (other := Path(path).with_name(name)) != Path(path)]
        hint = "".join(f"; beside it is {other}" for other in others if zipfile.is_zipfile(other))
        raise CheckpointError(f"{path} is not a checkpoint of plain tensors and values: {reason}{hint}") from error
    _check_parts(checkpoint, path)
    if weights == "current" and "current_model_state" in checkpoint:
        checkpoint |= {"state_dict": checkpoint["current_model_state"], "weights": weights}
    return checkpoint


def _check_parts(checkpoint: Any, path: str | Path) -> None:
    """Refuse what is no checkpoint of Lightning's.

    Raises:
        CheckpointError: saying what it is.
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
    """`load_state_dict` after `check_state`."""
    check_state(module, state, path)
    module.load_state_dict(state)


def check_state(module: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Refuse a state that does not fit the module, before anything is changed.

    Raises:
        CheckpointError: names or shapes differ, with the first of them.
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
    """Refuse a config that would build anything but classes of divflow, torch.nn modules and allowed classes.

    Raises:
        CheckpointError: naming all of the classes, and their places.
    """
    if lacking := lacking_targets(config, allowed, place):
        asked = ", ".join(f"{name!r} (at {where})" for name, where in lacking.items())
        raise CheckpointError(
            f"the checkpoint names {asked}, neither a class of divflow nor a module of torch.nn. If you trust it, "
            f"import it and pass load(..., allow=[{', '.join(lacking)}])"
        )


def lacking_targets(config: Any, allowed: Mapping[str, type], place: str = "divflow") -> dict[str, str]:
    """What a config would build that is neither of divflow nor a module of torch.nn nor allowed: places by names.

    Raises:
        CheckpointError: it holds an interpolation.
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
    # A class may be named by another module that has it; which is looked at only where it was imported before.
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

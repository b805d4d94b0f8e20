"""Checks of the settings of a run, before anything is built from them."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from divflow.runs.sweeps import check_resumed_alone
from divflow.runs.types import check_targets_arguments
from divflow.saved.build import WAYS, ConfigError, build_ways
from divflow.saved.checkpoint import folder_instead

__all__ = ["check_gpus", "check_paths", "check_seed", "check_settings", "check_values"]

_LARGEST = 3.4e38
# Settings whose classes need no Lightning, in the config and in its task.
_OF_TORCH = ("network", "base", "path", "coupling", "times", "sde", "objective", "sampler")
_OF_TASK = ("optimizer", "scheduler")
# Settings that are lists, with an example.
_LISTS = {
    **dict.fromkeys(("hidden", "joint", "channels", "block_out_channels", "event_shape"), "[64,64]"),
    **dict.fromkeys(("down_block_types", "up_block_types"), "[DownBlock2D,AttnDownBlock2D]"),
    **dict.fromkeys(("sigmas", "noise_levels"), "[0.5,0.1]"),
}


def check_settings(config: DictConfig) -> None:
    """Refuse wrong settings before Lightning is imported, which takes seconds.

    Args:
        config: of a whole run.

    Raises:
        ConfigError: a value is missing, a file or folder does not exist, `times` are those of another task, there are not the GPUs, a
            class does not take an argument, or all runs of a sweep would go on from one checkpoint.
        DivflowError: an estimator, a likelihood or a solver does not take an option.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{', '.join(missing)} must be given. Add {missing[0]}=...")
    _check_groups(config)
    check_values(OmegaConf.to_container(config, resolve=True))
    check_seed(config.seed)
    _check_steps(config.trainer)
    if config.device.get("accelerator") == "gpu":
        check_gpus(config.device.get("devices", "auto"))
    paths = {"data.path": config.data.get("path"), "ckpt_path": config.ckpt_path}
    if config.ckpt_path is None:
        paths["init_from"] = config.init_from
    check_paths(paths)
    check_resumed_alone(config.ckpt_path)
    _check_lists(OmegaConf.to_container(config, resolve=True))
    _check_times(config)
    for ways in (config, config.evaluation):
        build_ways({name: OmegaConf.to_container(ways[name], resolve=True) for name in WAYS})
    for name in (*_OF_TORCH, *(f"task.{name}" for name in _OF_TASK)):
        found = OmegaConf.select(config, name)
        if isinstance(found, DictConfig):
            check_targets_arguments(OmegaConf.to_container(found, resolve=True), name)


def _check_groups(config: DictConfig) -> None:
    """Check that each group is chosen, or names a class; the settings of Lightning name none."""
    for name in ("experiment", "recipe", "global", "_global"):
        if name in config:
            raise ConfigError(
                f"a config file would have no effect, since its settings stand under {name!r}; make `# @package _global_` its first line"
            )
    if "_target_" in config:
        raise ConfigError(
            f"a file with `# @package _global_` sets _target_={config._target_} at the top of the config; take that line out of it, or "
            "put the settings under their group, such as network:"
        )
    for key, value in config.items():
        if isinstance(value, DictConfig) and list(value) == [key]:
            raise ConfigError(
                f"{key!s} holds another {key!s}: take the line `{key!s}:` out of the file of {key!s}=, or make `# @package _global_` its first line"
            )
    groups = {name: config.get(name) for name in ("trainer", "device", "callbacks", "evaluation")}
    for name, value in groups.items():
        if not isinstance(value, DictConfig):
            raise ConfigError(f"{name} must be a mapping of settings, but is {value!r}")
    chosen = {name: config.get(name) for name in ("task", "data", "network", *WAYS)}
    chosen |= {f"evaluation.{name}": config.evaluation.get(name) for name in WAYS}
    chosen |= {f"callbacks.{name}": value for name, value in config.callbacks.items() if value is not None}
    for name, value in chosen.items():
        if not isinstance(value, DictConfig) or "_target_" not in value:
            raise ConfigError(f"{name} must be chosen, or name a class by {name}._target_, but is {value!r}")
    for name, choices in {
        "base": "base=normal or base=mean_free",
        "features": "features=none or features=fourier",
    }.items():
        if name not in config:
            raise ConfigError(f"{name} must be chosen. Use {choices}")


def check_values(value: Any, name: str = "") -> None:
    """Refuse numbers that a computer's numbers do not hold, and classes without a name.

    Raises:
        ConfigError: naming the setting and its value.
    """
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_values(item, f"{name}.{key}" if name else str(key))
    if name.endswith("._target_") and not isinstance(value, str):
        raise ConfigError(f"{name} must name a class or function, such as my_module.Velocity, but is {value!r}")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > _LARGEST:
        raise ConfigError(f"{name}={value} is beyond the largest number of single precision, {_LARGEST:.1e}")
    if isinstance(value, int) and abs(value) > sys.maxsize:
        raise ConfigError(f"{name}={value} is beyond the largest number of 64 bits, {sys.maxsize}")


def _check_lists(settings: Any, place: str = "") -> None:
    """Refuse text in place of a list, which Python would read letter by letter; where a list of names belongs, text is one name."""
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        if name in _LISTS and isinstance(value, str):
            raise ConfigError(f"{place}{name} must be a list, such as {_LISTS[name]}, but is the text {value!r}")
        _check_lists(value, f"{place}{name}.")


def _check_times(config: DictConfig) -> None:
    """Check `times`, one group for both tasks: densities of times for flow matching, weights over the times of an SDE."""
    if "times" not in config:
        return
    drawn = config.times.get("_target_")
    if "objective" in config and drawn is not None:
        raise ConfigError(f"{drawn} is for the times of flow matching. Use times=sde with task=score")
    if "coupling" in config and drawn is None:
        raise ConfigError("times=sde is for task=score. Use times=uniform, power or logit_normal with flow matching")


def check_seed(seed: object) -> None:
    """Refuse what is no seed, as Lightning takes it.

    Raises:
        ConfigError: with the value.
    """
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ConfigError(f"seed must be null or a whole number in [0, 2^32), but is {seed!r}")


def _check_steps(trainer: DictConfig) -> None:
    steps, interval = trainer.get("max_steps", -1), trainer.get("val_check_interval")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < -1:
        raise ConfigError(f"trainer.max_steps must be a whole number, or -1 for no limit, but is {steps!r}")
    if isinstance(interval, int | float) and interval <= 0:
        raise ConfigError(
            f"trainer.val_check_interval must be a number of steps or a share of an epoch, but is {interval}"
        )


def check_gpus(devices: Any) -> None:
    """Refuse GPUs that this machine does not have.

    Args:
        devices: how many, their numbers, or "auto" for all, as Lightning takes them.

    Raises:
        ConfigError: with the number of those there are, and what hides others.
    """
    there = torch.cuda.device_count()
    try:
        listed = [int(it) for it in devices] if isinstance(devices, Sequence) and not isinstance(devices, str) else None
        numbers = range(there if devices in ("auto", -1, "-1") else int(devices)) if listed is None else listed
    except (TypeError, ValueError):  # which Lightning takes or refuses
        return
    if there and all(0 <= number < there for number in numbers):
        return
    build = "" if torch.version.cuda or torch.version.hip else f"torch {torch.__version__} is built without CUDA. "
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    masked = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the others. " if hidden is not None else ""
    remedy = f"Use device.devices={there}" if there else "Use device=cpu or device=multi_process_cpu"
    raise ConfigError(
        f"device.devices={devices} asks for GPUs of this machine, but torch sees {there or 'none'}. {build}{masked}{remedy}"
    )


def check_paths(paths: Mapping[str, str | None]) -> None:
    """Refuse settings that are paths of nothing: data may be a file or a folder, anything else is a file.

    Raises:
        ConfigError: naming the setting and where it was looked for.
    """
    for name, path in paths.items():
        if path is None:
            continue
        if not isinstance(path, str) or not path:
            raise ConfigError(f"{name} must be a path, but is {path!r}")
        found = Path(path).expanduser()
        if name != "data.path" and (message := folder_instead(path)):
            raise ConfigError(f"{name}={message}")
        what, there = ("file or folder", found.exists()) if name == "data.path" else ("file", found.is_file())
        if not there:
            raise ConfigError(f"there is no {what} {path} (looked in {Path.cwd()}). Set {name} to an existing {what}")

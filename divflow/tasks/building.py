"""Tasks from plain values: one recipe for a run, and for restoring its task from a checkpoint."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from hydra.utils import get_object, instantiate
from torch.optim import Optimizer, lr_scheduler

from divflow.matching import GeodesicPath, LinearPath
from divflow.saved.build import build_density, build_objective, build_ways
from divflow.saved.checkpoint import check_state, check_targets, named_classes
from divflow.saved.named import ConfigError, named
from divflow.score import ScoreDensity, UnnormalizedDensity
from divflow.tasks.errors import TaskError

__all__ = ["build_task", "restore_task"]

_Task = TypeVar("_Task", bound=L.LightningModule)


def build_task(config: Mapping[str, Any], make: Callable[..., Any] | None = None, **arguments: Any) -> Any:
    """Build the untrained task that a config describes; the task saves the config in its checkpoints.

    Args:
        config: plain values. It describes a density as `build_density` takes it, with the settings of evaluation. Its `task` holds
            the class by `_target_`, the arguments of that class, the estimator, likelihood and solver of training (`training`),
            and for scores `objective` and `times`.
        make: class to build in place of that in the config.
        arguments: arguments of the class, which override those of the config.

    Returns:
        The task.
    """
    settings = dict(config["task"])
    density = build_density({**config, **settings.pop("training")})
    if isinstance(density, ScoreDensity | UnnormalizedDensity):
        described = {**config, **{name: settings.pop(name) for name in ("objective", "times")}}
        if "objective" not in arguments:
            arguments["objective"] = build_objective(described, density)
    if not isinstance(density, UnnormalizedDensity) and "evaluation" not in arguments:
        arguments["evaluation"] = density.flow.replace(**build_ways(config))
    settings = {name: value for name, value in settings.items() if name not in arguments}
    if "path" in (settings.get("objective") or {}):
        settings["objective"] = _on_manifold(settings["objective"], config.get("manifold"))
    made = instantiate({**settings, "_partial_": True}, _convert_="all")
    return (make or made.func)(density, config=dict(config), **made.keywords, **arguments)


def _on_manifold(objective: Mapping[str, Any], manifold: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give the path and the coupling of flow matching the manifold of the data.

    Raises:
        ConfigError: the path leaves the manifold, or is one of manifolds and there is none.
    """
    given = {name: it for name, it in objective.items() if isinstance(it, Mapping) and _takes_manifold(it)}
    if manifold is None:
        if "path" in given and given["path"].get("manifold") is None:
            raise ConfigError(
                "path=geodesic is for data on a manifold, but these are not; add manifold=sphere, or take data=sphere, torus or rotations"
            )
        return dict(objective)
    if "path" not in given:
        path = objective["path"]
        # Straight lines of a manifold are its geodesics.
        if named(path["_target_"], "path._target_") is not LinearPath or path.get("sigma_min"):
            raise ConfigError(f"path={dict(path)} leaves the manifold of the data; use path=geodesic")
        given["path"] = {"_target_": f"{GeodesicPath.__module__}.{GeodesicPath.__qualname__}"}
    return {**objective, **{name: {**it, "manifold": it.get("manifold") or manifold} for name, it in given.items()}}


def _takes_manifold(settings: Mapping[str, Any]) -> bool:
    made = named(settings["_target_"], "_target_") if "_target_" in settings else None
    return made is not None and "manifold" in inspect.signature(made).parameters


def restore_task(
    cls: type[_Task],
    checkpoint: Mapping[str, Any],
    path: str | Path,
    allow: Iterable[type | str],
    strict: bool | None,
    arguments: dict[str, Any],
) -> _Task:
    """Build the task of a checkpoint that has been read, with its weights.

    Args:
        cls: class that is asked for: the class of the checkpoint, or a base class or subclass of it.
        checkpoint: values as `read_checkpoint` returns them.
        path: of the checkpoint, for messages.
        allow: classes that may be built, in addition to those of divflow, `torch.nn` and `torch.optim`.
        strict: whether the names of all weights must match; True if None.
        arguments: arguments of the class, which override those of the checkpoint.

    Returns:
        The task, with the weights of the checkpoint.

    Raises:
        TaskError: the checkpoint describes no density and none is given, another argument is missing, or it is of another task.
        CheckpointError: the checkpoint names a class that is not allowed, or is of another architecture.
    """
    density, *others = (name for name, it in inspect.signature(cls).parameters.items() if it.default is it.empty)
    described = checkpoint.get("divflow") if density not in arguments else None
    if described is None or "divflow_task" not in checkpoint:
        lacking = [
            name for name in (density, *others) if name not in arguments and (described is None or name != density)
        ]
        if lacking:
            given = ", ".join(f"{name}={name}" for name in lacking)
            raise TaskError(
                f"{path} does not describe {' and '.join(lacking)}: it was not written by a run of divflow's command. Give "
                f"{'it' if len(lacking) == 1 else 'them'}, as they were built for training: {cls.__name__}.load_from_checkpoint(path, {given})"
            )
    if described is None:
        task = cls(**arguments)
    else:
        described = {name: it for name, it in described.items() if name not in ("columns", "context_columns")}
        check_targets(described, named_classes(allow))
        if "divflow_task" in checkpoint:
            task = _described(cls, {**described, "task": checkpoint["divflow_task"]}, path, allow, arguments)
        else:
            task = cls(build_density(described), **{"config": described, **arguments})
    task.on_load_checkpoint(dict(checkpoint))
    state = checkpoint.get("state_dict", {})
    if strict is not False:
        check_state(task, state, path)
    task.load_state_dict(state, strict=strict is not False)
    return task


def _described(
    cls: type[_Task], config: dict[str, Any], path: str | Path, allow: Iterable[type | str], arguments: dict[str, Any]
) -> _Task:
    """The task that a checkpoint describes, if it is one of `cls` or `cls` one of it."""
    settings = {name: it for name, it in config["task"].items() if name not in arguments}
    check_targets(settings, named_classes(allow) | _of_torch(), "divflow_task")
    trained = get_object(settings["_target_"])
    make = cls if isinstance(trained, type) and issubclass(cls, trained) else trained
    if not (isinstance(make, type) and issubclass(make, cls)):
        raise TaskError(
            f"{path} is of a {trained.__name__}, not of a {cls.__name__}. Use {trained.__name__}.load_from_checkpoint, or build a "
            f"{cls.__name__} of the density that divflow.load returns"
        )
    return build_task(config, make, **arguments)


def _of_torch() -> dict[str, type]:
    """Optimizers and schedules of torch, by their names."""
    found: dict[str, type] = {}
    for module, base in ((torch.optim, Optimizer), (lr_scheduler, lr_scheduler.LRScheduler)):
        found |= {f"{module.__name__}.{name}": it for name, it in vars(module).items() if _is_one(it, base)}
    return found


def _is_one(it: Any, base: type) -> bool:
    return isinstance(it, type) and issubclass(it, base)

"""What a run must share with the run that it resumes, and the settings that it takes from that run's checkpoint."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from divflow.errors import DivflowError

__all__ = ["ResumeError", "check_resumed", "trained_by", "warn_of_seed"]

# Parts of a checkpoint from which Lightning resumes.
_STATES = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "pytorch-lightning_version")


class ResumeError(DivflowError, ValueError):
    """A run can't resume from a checkpoint: another task or optimizer wrote it, or an average of the weights is missing."""


def trained_by(task: L.LightningModule, optimizer: Optimizer) -> dict[str, str]:
    """Names of the classes that train: task, optimizer and objective."""
    classes = {"task": type(task), "optimizer": type(optimizer)}
    if (objective := getattr(task, "objective", None)) is not None:
        classes["objective"] = type(objective)
    return {name: f"{cls.__module__}.{cls.__qualname__}" for name, cls in classes.items()}


def check_resumed(task: L.LightningModule, callbacks: Iterable[L.Callback], checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint of another training, and warn of settings that the checkpoint overrides.

    Args:
        task: the new task.
        callbacks: of the trainer.
        checkpoint: as Lightning saved it.

    Raises:
        ResumeError: task, optimizer or objective differ, or the checkpoint has an average of the weights and the run has none.
    """
    lacking = [name for name in _STATES if name not in checkpoint]
    if lacking or not isinstance(checkpoint["pytorch-lightning_version"], str):
        raise ResumeError(
            f"the checkpoint holds only weights, not what training resumes from ({', '.join(lacking) or 'its version'}). Start another run "
            "from its weights, by init_from=..."
        )
    new: Any = task.configure_optimizers()
    optimizer = new["optimizer"]
    now = trained_by(task, optimizer)
    for name, before in checkpoint.get("trained_by", now).items():
        if now.get(name) != before:
            raise ResumeError(
                f"the checkpoint was trained by the {name} {before}, not by {now.get(name)}, which would take that state for "
                "its own. Start another run from its weights, by init_from=..., or take the settings of config.yaml in its run's folder"
            )
    if "averaging_state" in checkpoint and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ResumeError(
            "the checkpoint's weights are averages over training, but this run has no callbacks.average and would resume from them as if "
            "it had trained to them. Keep callbacks.average, or start another run from its weights, by init_from=... and weights=averaged or current"
        )
    for state in checkpoint["optimizer_states"][:1]:
        sizes = [
            [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise ResumeError(
                f"the checkpoint's optimizer has groups of {sizes[0]} parameters, but this one has groups of {sizes[1]}. Start another run from its "
                "weights, by init_from=..."
            )
        scheduled = bool(checkpoint["lr_schedulers"])
        earlier, present = (_settings(it, scheduled) for it in (state["param_groups"][0], optimizer.param_groups[0]))
        _warn_of("optimizer", type(optimizer), earlier, present)
    if "lr_scheduler" in new:
        schedule = new["lr_scheduler"]["scheduler"]
        for state in checkpoint["lr_schedulers"][:1]:
            _warn_of("learning rate schedule", type(schedule), state, schedule.state_dict(), _rises(schedule, state))


def warn_of_seed(seed: int | None, checkpoint: Mapping[str, Any]) -> None:
    """Warn of a seed that is not that of the run that is resumed, whose order and noise go on.

    Args:
        seed: of the new run, or None for none.
        checkpoint: as Lightning saved it.
    """
    before = checkpoint.get("noise_seed", seed)
    if seed is not None and before != seed:
        warnings.warn(
            f"the order of rows and all noise go on with seed={before} of the checkpoint, not with seed={seed}, which only random numbers of "
            "your own code outside of training steps follow. Start another run from its weights, by init_from=..., to change that",
            stacklevel=2,
        )


def _settings(group: dict[str, Any], scheduled: bool) -> dict[str, Any]:
    """A group of an optimizer's parameters with the learning rate that its schedule began with, without one where that is not known."""
    if "initial_lr" in group:
        return group | {"lr": group["initial_lr"]}
    return {name: value for name, value in group.items() if name != "lr" or not scheduled}


def _rises(schedule: Any, before: Mapping[str, Any]) -> str:
    """What a cosine does beyond its end, if training is to go on there; empty for others."""
    if not isinstance(schedule, CosineAnnealingLR) or before.get("T_max", schedule.T_max) >= schedule.T_max:
        return ""
    return f" Beyond T_max={before['T_max']} the rate rises again to {before['base_lrs'][0]:g}."


def _warn_of(what: str, make: type, before: Mapping[str, Any], now: Mapping[str, Any], more: str = "") -> None:
    """Warn of arguments of a class that two states of it differ in; `more` is what follows from it."""
    arguments = inspect.signature(make).parameters.keys() - {"params", "last_epoch"}
    if "max_momentum" in before:  # which a schedule changes
        arguments -= {"betas", "momentum"}
    names = sorted(arguments & before.keys() & now.keys())
    plain = [name for name in names if isinstance(now[name], int | float | str | tuple | list)]
    other = [name for name in plain if not _same(before[name], now[name])]
    if other:
        warnings.warn(
            f"the {what} goes on with {', '.join(f'{name}={before[name]}' for name in other)} of the checkpoint, not with "
            f"{', '.join(f'{name}={now[name]}' for name in other)}.{more} Start another run from its weights, by init_from=..., to change that",
            stacklevel=3,
        )


def _same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, tuple | list) and isinstance(b, tuple | list) else a == b

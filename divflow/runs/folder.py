"""The folder of a run: its files, and the protection of another run's results."""

import contextlib
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

import divflow
from divflow.saved.build import ConfigError

try:
    import fcntl
except ImportError:  # a system without file locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_folder", "claim", "earlier_metrics", "link_latest", "save_config", "save_results", "take_along"]

_RESULTS = ("checkpoints/*.ckpt", "samples.npy", "results.json", "figures/*.png")
_OTHERS = ("config.yaml", "metrics.csv")
_FOLDER = "<output_dir>"
# Folder of a run that is started again from its config.yaml: a new one.
_AGAIN = "outputs/again/${now:%Y-%m-%d_%H-%M-%S-%f}"


def check_folder(output: Path, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuse a folder that can't be written, or holds the results of another run, before anything is loaded.

    Args:
        output: the folder.
        ckpt_path: checkpoint to resume from, or None.
        overwrite: whether results of another run are to be deleted.

    Raises:
        ConfigError: with the reason.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir={output} can't be written ({error.strerror}). Choose another folder by output_dir=..."
        ) from error
    if not _is_own(output, ckpt_path):
        _check_free(output, overwrite)


@contextlib.contextmanager
def claim(output: Path, ckpt_path: str | None, step: int, overwrite: bool) -> Iterator[None]:
    """Create the run's folder and hold it for this run alone, within this context and until the process ends.

    Args:
        output: the folder.
        ckpt_path: checkpoint to resume from, which may be in the same folder.
        step: step of that checkpoint.
        overwrite: whether results of another run, or later ones of this run, are deleted.

    Raises:
        ConfigError: there are such results and `overwrite` is False, or another run is writing to the folder.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise ConfigError(f"output_dir={output} can't be made: {error.strerror}. Choose another folder") from error
    try:
        if folder is not None:
            _lock(folder, output)
        _empty(output, ckpt_path, step, overwrite)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _lock(folder: int, output: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another run is writing to {output} now. Choose another folder by output_dir=..., or wait until it ends"
        ) from None
    except OSError:  # a file system without locks
        return


def _empty(output: Path, ckpt_path: str | None, step: int, overwrite: bool) -> None:
    if _is_own(output, ckpt_path):
        done = _steps(output / "results.json")
        if done <= step or overwrite:
            return
        raise ConfigError(
            f"{output} holds the results of this run at step {done}, later than step {step} of {ckpt_path}. Go on from it in "
            "another folder by output_dir=..., or let the later results be replaced by overwrite=true"
        )
    held = _check_free(output, overwrite)
    for path in (*held, *(output / name for name in _OTHERS if held)):
        path.unlink(missing_ok=True)


def _is_own(output: Path, ckpt_path: str | None) -> bool:
    """Whether the checkpoint is of the run in that folder."""
    return ckpt_path is not None and Path(ckpt_path).expanduser().resolve().parent.parent == output.resolve()


def _check_free(output: Path, overwrite: bool) -> list[Path]:
    """Results of another run in the folder.

    Raises:
        ConfigError: there are some, and they may not be overwritten.
    """
    held = sorted(path for pattern in _RESULTS for path in output.glob(pattern))
    if held and not overwrite:
        last = output / "checkpoints" / "last.ckpt"
        going_on = f", go on with that run by ckpt_path={last}," if last.is_file() else ""
        raise ConfigError(
            f"{output} holds the results of another run ({held[0].relative_to(output)}"
            f"{f' and {len(held) - 1} more' if len(held) > 1 else ''}). Choose another folder by output_dir=..."
            f"{going_on} or let them be deleted by overwrite=true"
        )
    return held


def _steps(results: Path) -> int:
    """Steps of a finished run; 0 if there is none."""
    try:
        return int(json.loads(results.read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def save_config(config: DictConfig, output: Path, resumed: str = "") -> None:
    """Write `config.yaml`, from which the run can be started again, here or elsewhere.

        divflow train --config-path=FOLDER --config-name=config

    All values are resolved except the run's folder, which is a new one each time. Files are named by absolute paths.

    Args:
        config: as composed.
        output: the run's folder.
        resumed: what the run resumes from, which is noted; started again, it trains from the beginning.
    """
    marked = config.copy()
    marked.output_dir = _FOLDER
    plain = _replaced(OmegaConf.to_container(marked, resolve=True), _FOLDER, "${output_dir}")
    if plain["data"].get("path") is not None:
        plain["data"]["path"] = str(Path(plain["data"]["path"]).expanduser().absolute())
    again = {
        "defaults": ["_self_", {"override hydra/job_logging": "stdout"}],
        "hydra": {"output_subdir": None, "run": {"dir": "${output_dir}"}},
    }
    plain |= {"output_dir": _AGAIN, "ckpt_path": None, "overwrite": False}
    note = f"; it went on from {resumed}" if resumed else ""
    with open(output / "config.yaml", "w") as file:
        file.write(f"# A run of divflow {divflow.__version__}{note}. To start it again:\n")
        file.write(f"# divflow train --config-path={output.absolute()} --config-name=config\n")
        file.write(OmegaConf.to_yaml(again | plain))


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def save_results(
    results: Mapping[str, float], seconds: float, steps: int, seed: int | None, output: Path, before: int = 0
) -> None:
    """Write `results.json`: the test metrics, with seconds, steps and seed.

    Args:
        results: test metrics by name.
        seconds: duration of training.
        steps: steps of the optimizer.
        seed: seed of the training; of a resumed run that of its checkpoint.
        output: the run's folder.
        before: step that a resumed run went on from, before which nothing is in `seconds`.
    """
    versions = {"divflow": divflow.__version__, "torch": torch.__version__}
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None
    content = {
        "metrics": dict(results),
        "seconds": seconds,
        "steps": steps,
        "resumed_at_step": before,
        "seed": seed,
        "overrides": overrides,
        "versions": versions,
    }
    part = output / "results.json.part"
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, output / "results.json")


def take_along(ckpt_path: Path, output: Path) -> None:
    """Copy the checkpoint, and the best one so far, into the folder of the resumed run, unless it has its own."""
    for source, name in ((ckpt_path, "last.ckpt"), (ckpt_path.with_name("best.ckpt"), "best.ckpt")):
        here = output / "checkpoints" / name
        if source.is_file() and not here.is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, here)


def earlier_metrics(ckpt_path: Path, step: int, output: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv` that a run had logged by the step of its checkpoint, without those of a test."""
    files = [folder / "metrics.csv" for folder in (output, ckpt_path.parent.parent)]
    rows = next((list(csv.DictReader(path.read_text().splitlines())) for path in files if path.is_file()), [])
    # A row may have been cut off when the run was killed.
    whole = [row for row in rows if (row.get("step") or "").isdigit() and None not in row.values()]
    return [row for row in whole if int(row["step"]) < step and not row.get("test/nll") and not row.get("test/loss")]


def link_latest(output: Path) -> None:
    """Link `outputs/latest` to the latest run in `outputs`."""
    folder = get_original_cwd() if HydraConfig.initialized() else "."  # a job may have changed it
    root = Path(folder, "outputs").absolute()
    if root not in output.absolute().parents:
        return
    part = root / f".latest-{os.getpid()}"
    try:
        part.symlink_to(output.absolute().relative_to(root), target_is_directory=True)
        os.replace(part, root / "latest")
    except OSError:  # a system without links, or a folder of that name
        part.unlink(missing_ok=True)

"""`divflow compare`: runs side by side, in a table and by their learning curves."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from divflow.errors import DivflowError

__all__ = ["run"]

# Of the folder, and not of what was trained.
_IGNORED = ("hydra", "defaults", "output_dir", "ckpt_path", "overwrite")
_ERROR = "_standard_error"


@dataclass(frozen=True)
class _Run:
    folder: Path
    settings: dict[str, Any]
    results: dict[str, str]


def run(arguments: Sequence[str]) -> None:
    """Compare the finished runs of some folders.

    Raises:
        SystemExit: with 1 and its message, no run, one that can't be read, or a figure that exists.
    """
    parser = argparse.ArgumentParser(prog="divflow compare", description="The runs of folders side by side.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run, or one with runs anywhere below")
    parser.add_argument("--out", default="compare.png", help="the figure of the learning curves (default: compare.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    given = parser.parse_args(list(arguments))
    try:
        _compare([Path(folder) for folder in given.folders], given.out, given.overwrite)
    except DivflowError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _compare(folders: Sequence[Path], out: str, overwrite: bool) -> None:
    from rich.console import Console

    from divflow.build import ConfigError
    from divflow.cli.output import check_output, write_figure
    from divflow.figures import plot_curves

    files = sorted({file.resolve() for folder in folders for file in folder.rglob("results.json")})
    if not files:
        raise ConfigError(f"there is no finished run (no results.json) below {', '.join(map(str, folders))}")
    runs = _named([_read(file.parent) for file in files])
    console = Console()
    console.print(_table(runs))
    try:
        path = check_output(out, (".png",), overwrite)
    except ConfigError as error:
        raise ConfigError(str(error).replace("out=...", "--out").replace("overwrite=true", "--overwrite")) from None
    tables = {name: it.folder / "metrics.csv" for name, it in runs.items() if (it.folder / "metrics.csv").is_file()}
    figure = plot_curves(tables)
    if figure is None:
        console.print("No learning curves: nothing was logged in a metrics.csv", highlight=False)
        return
    write_figure(path, figure)
    console.print(f"Learning curves: {path}", soft_wrap=True, highlight=False)


def _read(folder: Path) -> _Run:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    from divflow.build import ConfigError

    try:
        content = json.loads((folder / "results.json").read_text())
        metrics, seconds, steps = content["metrics"], content["seconds"], content["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'results.json'} is not that of a run: {error!r}") from error
    settings: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        try:
            loaded = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        except YAMLError as error:
            raise ConfigError(f"{folder / 'config.yaml'} can't be read: {error}") from error
        flat = _flat({key: value for key, value in loaded.items() if key not in _IGNORED})
        settings = dict(_named_class(key, value) for key, value in flat.items())
    shown = {name: _with_error(name, metrics) for name in metrics if f"{name}{_ERROR}" in metrics or "val/" in name}
    return _Run(folder, settings, shown | {"seconds": f"{seconds:.0f}", "steps": str(steps)})


def _with_error(name: str, metrics: Mapping[str, float]) -> str:
    error = metrics.get(f"{name}{_ERROR}")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _named(runs: Sequence[_Run]) -> dict[str, _Run]:
    """By their folders, as far as these differ."""
    root = os.path.commonpath([it.folder.parent for it in runs])
    return {os.path.relpath(it.folder, root): it for it in runs}


def _table(runs: Mapping[str, _Run]) -> Any:
    """The settings that differ, then the results; a run is a column where there are more of these than runs."""
    from rich.table import Table

    keys = dict.fromkeys(key for it in runs.values() for key in it.settings)
    differing = [key for key in keys if len({str(it.settings.get(key)) for it in runs.values()}) > 1]
    results = list(dict.fromkeys(name for it in runs.values() for name in it.results))
    lines = [["", *differing, *results]]
    for name, it in runs.items():
        shown = [str(it.settings.get(key, "–")) for key in differing]
        lines.append([name, *shown, *(it.results.get(key, "–") for key in results)])
    if len(lines[0]) > len(lines):
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(title=f"{len(runs)} runs", title_justify="left")
    for name in lines[0]:
        table.add_column(name, overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _named_class(key: str, value: Any) -> tuple[str, Any]:
    """`estimator._target_: divflow.divergence.Exact` is estimator: Exact to the reader."""
    return (key.removesuffix("._target_"), value.rpartition(".")[2]) if key.endswith("._target_") else (key, value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat

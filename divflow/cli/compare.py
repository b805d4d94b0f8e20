"""`divflow compare`: runs side by side, as a table and as learning curves."""

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from divflow.errors import DivflowError

__all__ = ["run"]

# Settings of the folder, not of the training.
_IGNORED = ("hydra", "defaults", "output_dir", "ckpt_path", "overwrite")
_ERROR = "_standard_error"
# Runs are sorted by the first of these that all of them have, the smallest first.
_BEST = ("test/nll", "test/loss")
_EXAMPLES = """\
examples:
  divflow compare outputs/
  divflow compare outputs/sweeps --out sweeps.png
  divflow compare outputs/flow_two_moons outputs/flow_matching_two_moons --overwrite"""


@dataclass(frozen=True)
class _Run:
    """A finished run, or several that differ only by their seeds.

    Attributes:
        folder: folder of the run, or the one that holds all of them.
        settings: settings by name.
        metrics: metrics of each run, by name.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, float]]


def run(arguments: Sequence[str]) -> None:
    """Compare the finished runs of some folders; a line reports each run that can't be read, which is left out.

    Raises:
        SystemExit: with 1 and a message if there is no run, or the figure exists.
    """
    parser = argparse.ArgumentParser(
        prog="divflow compare",
        description="Show finished runs side by side: the settings that differ, the results, and the learning curves.",
        epilog=_EXAMPLES,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100),
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="the folder of a run, or one with runs anywhere below"
    )
    parser.add_argument("--out", default="compare.png", help="figure of the learning curves (default: compare.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    given = parser.parse_args(list(arguments))
    try:
        _compare([Path(folder) for folder in given.folders], given.out, given.overwrite)
    except DivflowError as error:
        sys.exit(f"error: {error}")


def _compare(folders: Sequence[Path], out: str, overwrite: bool) -> None:
    from rich.console import Console

    from divflow.callbacks.plots import plot_curves
    from divflow.cli.output import check_output, write_figure
    from divflow.saved.build import ConfigError

    files = sorted({file.resolve() for folder in folders for file in folder.rglob("results.json")})
    if not files:
        raise ConfigError(
            f"there is no finished run (no results.json) below {', '.join(map(str, folders))}. Name the folder of a run or of a sweep"
        )
    runs, broken = [], []
    for file in files:
        try:
            runs.append(_read(file.parent))
        except ConfigError as error:
            broken.append(error)
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise ConfigError(str(broken[0]))
    console = Console()
    console.print(_table(_named(_sorted(_grouped(runs))), len(runs)))
    try:
        path = check_output(out, (".png",), overwrite)
    except ConfigError as error:
        raise ConfigError(str(error).replace("out=...", "--out").replace("overwrite=true", "--overwrite")) from None
    tables = {name: it.folder / "metrics.csv" for name, it in _named(runs).items()}
    tables = {name: path for name, path in tables.items() if path.is_file()}
    figure = plot_curves(tables)
    if figure is None:
        console.print("No learning curves: nothing was logged in a metrics.csv", highlight=False)
        return
    write_figure(path, figure)
    console.print(f"Learning curves: {path}", soft_wrap=True, highlight=False)


def _read(folder: Path) -> _Run:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    from divflow.saved.build import ConfigError

    try:
        content = json.loads((folder / "results.json").read_text())
        metrics, seconds, steps = content["metrics"], content["seconds"], content["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'results.json'} was not written by a run: {error!r}. Remove it, or name other folders"
        ) from error
    settings: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        try:
            loaded = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        except YAMLError as error:
            raise ConfigError(f"{folder / 'config.yaml'} can't be read: {error}") from error
        flat = _flat({key: value for key, value in loaded.items() if key not in _IGNORED})
        settings = dict(_named_class(key, value) for key, value in flat.items())
    return _Run(folder, settings, [metrics | {"seconds": seconds, "steps": steps}])


def _grouped(runs: Sequence[_Run]) -> list[_Run]:
    """Group the runs that differ only by their seeds."""
    groups: dict[str, list[_Run]] = {}
    for it in runs:
        groups.setdefault(json.dumps(it.settings | {"seed": None}, sort_keys=True, default=str), []).append(it)
    return [
        group[0]
        if len(group) == 1
        else _Run(
            Path(os.path.commonpath([it.folder for it in group])) / _in_common([it.folder.name for it in group]),
            group[0].settings | {"seed": ", ".join(str(it.settings.get("seed")) for it in group)},
            [metrics for it in group for metrics in it.metrics],
        )
        for group in groups.values()
    ]


def _in_common(names: Sequence[str]) -> str:
    """Names without the parts that differ, such as `lr-0.1_seed-*`."""
    parts = [name.split("_") for name in names]
    if len({len(it) for it in parts}) > 1:
        return "*"
    return "_".join(same[0] if len(set(same)) == 1 else _starred(same) for same in zip(*parts, strict=True))


def _starred(parts: Sequence[str]) -> str:
    heads = {part.partition("-")[0] for part in parts}
    return f"{heads.pop()}-*" if len(heads) == 1 else "*"


def _sorted(runs: Sequence[_Run]) -> list[_Run]:
    by = next((name for name in _BEST if all(name in it.metrics[0] for it in runs)), None)
    if by is None:
        return list(runs)
    means = [statistics.fmean(metrics[by] for metrics in it.metrics) for it in runs]
    order = sorted(range(len(runs)), key=lambda i: (math.isnan(means[i]), means[i]))
    return [runs[i] for i in order]


def _shown(metrics: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Results with their standard errors, and over what these are taken: the rows of the test, or several seeds."""
    first, count = metrics[0], len(metrics)
    shown = {}
    for name in (name for name in first if f"{name}{_ERROR}" in first or "val/" in name):
        values = [it[name] for it in metrics if name in it]
        if count == 1:
            error = first.get(f"{name}{_ERROR}")
            shown[name] = f"{values[0]:.4f}" + ("" if error is None else f" ± {error:.4f}")
        else:
            shown[name] = f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / math.sqrt(count):.4f}"
    for name in (name for name in first if name.endswith("quadrature_error")):
        shown[name] = f"{statistics.fmean(it[name] for it in metrics if name in it):.1e}"
    for name in ("seconds", "steps"):
        shown[name] = f"{statistics.fmean(it[name] for it in metrics):.0f}"
    over = f"{count} seeds" if count > 1 else "test rows" if any(name.endswith(_ERROR) for name in first) else None
    return shown if over is None else shown | {"± over": over}


def _named(runs: Sequence[_Run]) -> dict[str, _Run]:
    """Name runs by the parts of their folders that differ."""
    root = os.path.commonpath([it.folder.parent for it in runs])
    return {os.path.relpath(it.folder, root): it for it in runs}


def _table(runs: Mapping[str, _Run], count: int) -> Any:
    """Table of the settings that differ, then of the results; runs are columns if there are more rows than runs."""
    from rich.table import Table

    keys = dict.fromkeys(key for it in runs.values() for key in it.settings)
    values = {key: [str(it.settings.get(key)) for it in runs.values()] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1 and not _is_of_group(key, values)]
    shown = {name: _shown(it.metrics) for name, it in runs.items()}
    results = list(dict.fromkeys(name for it in shown.values() for name in it))
    lines = [["", *differing, *results]]
    for name, it in runs.items():
        settings = [str(it.settings.get(key, "–")) for key in differing]
        lines.append([name, *settings, *(shown[name].get(key, "–") for key in results)])
    if len(lines[0]) > len(lines):
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(title=f"{count} runs, the best first", title_justify="left")
    for number, name in enumerate(lines[0]):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _is_of_group(key: str, values: Mapping[str, Sequence[str]]) -> bool:
    """Whether an argument of the task is that of a group in all runs: `task.objective.coupling` takes `coupling`."""
    parts = key.split(".")
    shorter = (".".join(parts[i:]) for i in range(1, len(parts)) if parts[0] == "task")
    return any(values.get(name) == values[key] for name in shorter)


def _named_class(key: str, value: Any) -> tuple[str, Any]:
    """`estimator._target_: divflow.divergence.Exact` is estimator: Exact to the reader."""
    return (key.removesuffix("._target_"), value.rpartition(".")[2]) if key.endswith("._target_") else (key, value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat

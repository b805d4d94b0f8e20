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
# Settings that are names of columns, one or a list.
_NAMES = ("data.columns", "data.context", "data.discrete")
# Settings of the data that leave the density of the test rows as it is; other ones may make other data.
_SAME_DATA = [
    *(f"data.{name}" for name in ("batch_size", "eval_batch_size", "seed", "cache")),
    *(f"data.num_{name}" for name in ("train", "val", "test", "draws", "weighted")),
    *(f"data.{name}_fraction" for name in ("val", "test")),
]
# Width up to which cells are shown in one line where there is room for fewer columns.
_WIDEST = 20
# Runs are sorted by the first of these that all of them have, the smallest first.
_BEST = ("test/nll", "test/loss")
_EXAMPLES = """\
examples:
  divflow compare outputs/
  divflow compare outputs/sweeps --out sweeps.png
  divflow compare outputs/flow_two_moons outputs/flow_matching_two_moons --out both.csv --overwrite"""


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

    @property
    def data(self) -> str:
        """The data, by their settings."""
        of_data = {key: it for key, it in self.settings.items() if key.partition(".")[0] == "data"}
        return json.dumps(
            {key: it for key, it in of_data.items() if key not in _SAME_DATA}, sort_keys=True, default=str
        )


def run(arguments: Sequence[str]) -> None:
    """Compare the finished runs of some folders; a line reports each run that is left out, unreadable or repeated.

    Raises:
        SystemExit: with 1 and a message if there is no run, or the file of the figure or the table exists.
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
    parser.add_argument("--out", help="write the learning curves to this .png, or the table to this .csv")
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    given = parser.parse_args(list(arguments))
    try:
        _compare([Path(folder) for folder in given.folders], given.out, given.overwrite)
    except DivflowError as error:
        sys.exit(f"error: {error}")


def _compare(folders: Sequence[Path], out: str | None, overwrite: bool) -> None:
    from rich.console import Console

    from divflow.callbacks.plots import plot_curves
    from divflow.cli.output import check_output, write_figure, write_lines
    from divflow.saved.build import ConfigError

    try:
        path = None if out is None else check_output(out, (".png", ".csv"), overwrite)
    except ConfigError as error:
        message = (
            str(error)
            .replace("out=...", "--out FILE")
            .replace("out=", "--out ")
            .replace("overwrite=true", "--overwrite")
        )
        raise ConfigError(message) from None
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
    runs = _without_repeats(runs)
    named = _named(_sorted(_grouped(runs)))
    lines, console = _lines(named), Console()
    console.print(_title(named, len(runs)), soft_wrap=True, highlight=False)
    for table in _tables(lines, console.width):
        console.print(table)
    if path is None:
        return
    if path.suffix == ".csv":
        write_lines(path, lines)
        console.print(f"Table: {path}", soft_wrap=True, highlight=False)
        return
    curves = {name: it.folder / "metrics.csv" for name, it in named.items()}
    figure = plot_curves({name: table for name, table in curves.items() if table.is_file()})
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
        before = content.get("resumed_at_step", 0)  # which earlier versions did not write
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
    if "seed" in content:  # that of the training, also where a run with another one went on with it
        settings["seed"] = content["seed"]
    return _Run(folder, settings, [metrics | {"seconds": seconds, "steps": steps, "resumed_at_step": before}])


def _without_repeats(runs: Sequence[_Run]) -> list[_Run]:
    """Leave out runs of the same settings and seed as another, which are no other sample of the training; report each."""
    first: dict[str, _Run] = {}
    for it in runs:
        key = str(it.folder) if it.settings.get("seed") is None else f"{_but_for_seed(it)}{it.settings['seed']}"
        if key in first:
            print(
                f"left out: {it.folder} repeats the settings and seed={it.settings['seed']} of {first[key].folder}",
                file=sys.stderr,
            )
        first.setdefault(key, it)
    return list(first.values())


def _but_for_seed(it: _Run) -> str:
    return json.dumps(it.settings | {"seed": None}, sort_keys=True, default=str)


def _grouped(runs: Sequence[_Run]) -> list[_Run]:
    """Group the runs that differ only by their seeds."""
    groups: dict[str, list[_Run]] = {}
    for it in runs:
        groups.setdefault(_but_for_seed(it), []).append(it)
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
    """Sort the runs of each data set by their results, the best first."""
    order = list(dict.fromkeys(it.data for it in runs))
    by = {data: [it for it in runs if it.data == data] for data in order}
    return [it for data in order for it in sorted(by[data], key=lambda it: _rank(it, by[data]))]


def _rank(run: _Run, others: Sequence[_Run]) -> tuple[bool, float]:
    by = next((name for name in _BEST if all(name in it.metrics[0] for it in others)), None)
    mean = 0.0 if by is None else statistics.fmean(metrics[by] for metrics in run.metrics)
    return math.isnan(mean), mean


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
    if before := max(it["resumed_at_step"] for it in metrics):
        shown["seconds"] += f" since step {before}" if count == 1 else " since some were resumed"
    over = f"{count} seeds" if count > 1 else "test rows" if any(name.endswith(_ERROR) for name in first) else None
    return shown if over is None else shown | {"± over": over}


def _named(runs: Sequence[_Run]) -> dict[str, _Run]:
    """Name runs by the parts of their folders that differ."""
    root = os.path.commonpath([it.folder.parent for it in runs])
    return {os.path.relpath(it.folder, root): it for it in runs}


def _title(runs: Mapping[str, _Run], count: int) -> str:
    data = len({it.data for it in runs.values()})
    counted = f"{count} run{'s' if count > 1 else ''}"
    if data == 1:
        return f"{counted}, the best first"
    return f"{counted} on {data} data sets, whose values can't be compared; the best on each first"


def _lines(runs: Mapping[str, _Run]) -> list[list[str]]:
    """Cells of the settings that differ, then of the results; runs are columns if there are more rows than runs."""
    keys = dict.fromkeys(key for it in runs.values() for key in it.settings)
    values = {key: [str(it.settings.get(key)) for it in runs.values()] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1 and not _is_of_group(key, values)]
    shown = {name: _shown(it.metrics) for name, it in runs.items()}
    results = list(dict.fromkeys(name for it in shown.values() for name in it))
    lines = [["", *differing, *results]]
    for name, it in runs.items():
        settings = [str(it.settings.get(key, "–")) for key in differing]
        lines.append([name, *settings, *(shown[name].get(key, "–") for key in results)])
    return [list(line) for line in zip(*lines, strict=True)] if len(lines[0]) > len(lines) else lines


def _tables(lines: Sequence[Sequence[str]], width: int) -> list[Any]:
    """As many tables, one below the other, as leave the columns wide enough to be read."""
    from rich.table import Table

    widths = [min(_WIDEST, max(map(len, column))) + 3 for column in zip(*lines, strict=True)]
    parts: list[list[int]] = [[]]
    for number in range(1, len(widths)):
        if parts[-1] and widths[0] + sum(widths[i] for i in (*parts[-1], number)) + 1 > width:
            parts.append([])
        parts[-1].append(number)
    tables = []
    for part in parts:
        table = Table()
        for number in (0, *part):
            table.add_column(lines[0][number], overflow="fold", no_wrap=number == 0)
        for line in lines[1:]:
            table.add_row(*(line[number] for number in (0, *part)))
        tables.append(table)
    return tables


def _is_of_group(key: str, values: Mapping[str, Sequence[str]]) -> bool:
    """Whether an argument of the task is that of a group in all runs: `task.objective.coupling` takes `coupling`."""
    parts = key.split(".")
    shorter = (".".join(parts[i:]) for i in range(1, len(parts)) if parts[0] == "task")
    return any(values.get(name) == values[key] for name in shorter)


def _named_class(key: str, value: Any) -> tuple[str, Any]:
    """`estimator._target_: divflow.divergence.Exact` is estimator: Exact to the reader, and a name of a column a list of one."""
    if key in _NAMES and isinstance(value, str | int):
        return key, [str(value)]
    return (key.removesuffix("._target_"), value.rpartition(".")[2]) if key.endswith("._target_") else (key, value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat

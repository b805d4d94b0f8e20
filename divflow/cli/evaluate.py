"""`divflow evaluate`: the log-density of every row of a data set under a trained density."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Generator, Tensor

from divflow.cli.output import batches, check_output, write_table
from divflow.cli.trained import (
    Trained,
    check_model,
    data_config,
    launched,
    load_trained,
    named_device,
    names_other_data,
    scaled_to_model,
)
from divflow.flow import FlowDensity
from divflow.flow.evaluation_time import expect, limited
from divflow.flow.units import warn_of_far_context
from divflow.operators.context import context_rows, joined_contexts, mapped
from divflow.runs.report import metrics_table
from divflow.saved.build import ConfigError
from divflow.score import UnnormalizedDensity

if TYPE_CHECKING:  # both import Lightning, and mistakes are reported first
    from lightning.fabric import Fabric

    from divflow.data import TensorDataModule
    from divflow.data.batch import Parts

__all__ = ["run"]

_SPLITS = ("train", "val", "test", "all")
# Columns of the file, and those for discrete data alone.
_COLUMNS = ("log_prob", "standard_error", "quadrature_error")
_DISCRETE = ("bits_per_dim", "bits_per_dim_importance_weighted")
_ROW = "row"
_AVERAGED = ("nll", "gap", *_DISCRETE, "nfe", "nfe_divergence", "quadrature_error")
_FINER = "likelihood=quadrature_tight, with a smaller likelihood.tolerance, or solver=adaptive with a smaller solver.rtol and .atol"
_CHEAPER = "Another split, more processes (device=...) or estimates (estimator=hutchinson) take less"
_VARIANCES = ("estimator_variance", "dequantization_variance")


def run(config: DictConfig) -> float:
    """Evaluate a trained density, as `configs/evaluate.yaml` composes it.

    Returns:
        The mean negative log-likelihood in nats.

    Raises:
        DivflowError: a setting, the checkpoint, the data or the solve is not what it needs to be.
    """
    check_model(config)
    out = check_output(config.out, (".csv", ".npy"), config.overwrite)
    minutes = config.max_minutes
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise ConfigError(f"max_minutes must be a positive number, or null for no limit, but is {minutes!r}")
    if config.split not in (None, *_SPLITS):
        raise ConfigError(f"split must be null or one of {', '.join(_SPLITS)}, but is {config.split!r}")
    named_device(config.device, several=True)
    trained = load_trained(config)
    if isinstance(trained.density, UnnormalizedDensity):
        raise ConfigError(f"{trained.name} is a score without SDE, which has no log-density. Sample from it instead")
    settings = data_config(config, trained)
    other = names_other_data(config)
    split = config.split or _default_split(settings, trained, other)
    parts, numbers, data = _rows(settings, split, trained, other)
    rows = parts.x
    density = scaled_to_model(trained.density, config.data_range, None if data is None else data.levels, trained.name)
    shape = tuple(trained.density.flow.event_shape)
    if tuple(rows.shape[1:]) != shape:
        raise ConfigError(
            f"the data are events of shape {tuple(rows.shape[1:])}, but {trained.name} was trained on {shape}. "
            "Give the columns, or the data.event_shape, of the training"
        )
    _check_within(density, rows, numbers)
    if density.context_range is not None:  # once, not in each batch
        warn_of_far_context(cast(Tensor, parts.context), density.context_range, density.context_columns)
        density.context_range = None
    size = config.batch_size or settings.get("eval_batch_size") or settings.get("batch_size", 1000)
    fabric = launched(config.device)
    _expect(fabric, density, parts, size, config.max_minutes)
    with limited(config.max_minutes, "the evaluation", _CHEAPER):
        values = _evaluated(fabric, density, parts, data, size, config.seed)
    metrics = _metrics(values, parts.weight, None if data is None else data.bit_per_dim, fabric.is_global_zero)
    if fabric.is_global_zero:
        names = [name for name in (*_COLUMNS, *_DISCRETE) if name in _COLUMNS or not values[name].isnan().all()]
        columns = [*(values[name] for name in names), numbers.double()]
        write_table(out, [*names, _ROW], torch.stack(columns, dim=1).numpy(), [_ROW])
        there = getattr(data, "num_rows", len(rows)) if other else len(rows)
        counted = f"{len(rows)} rows" if there == len(rows) else f"{len(rows)} of {there} rows"
        _print(metrics, f"{trained.name}: {counted}, split {split}", out)
        if there > len(rows) and split != "all":
            print(f"To evaluate all {there} rows, add split=all")
    fabric.barrier()
    return metrics["nll"]


def _default_split(settings: dict[str, Any], trained: Trained, other: bool) -> str:
    """Split to evaluate if none is given: the test, or all rows of another file of which none was trained on."""
    from divflow.data.split import has_none_of
    from divflow.data.undivided import undivided  # here, since it imports Lightning

    if not other or (whole := undivided(settings)) is None:
        return "test"
    _, digests, name = whole
    state = trained.data_states.get(name, {})
    if "digests" not in state or not has_none_of(state, digests):
        return "test"
    print(f"no row of {settings['path']} was trained on, so all of them are evaluated")
    return "all"


def _rows(settings: dict[str, Any], split: str, trained: Trained, other: bool) -> tuple["Parts", Tensor, Any]:
    """Parts of a split, the numbers of its rows in the file, and the data module, if it is one of divflow's.

    With split=all the rows are those of the file, in its order. Other splits are those of the training, unless these are other data.
    """
    from divflow.data.batch import parts_of  # here, since it imports Lightning
    from divflow.data.module import TensorDataModule
    from divflow.data.own import split_parts
    from divflow.data.split import SplitData, describe_changes
    from divflow.data.undivided import undivided
    from divflow.runs.data import build_data

    if split == "all" and (whole := undivided(settings)) is not None:
        found, digests, name = whole
        if not other and (changes := describe_changes(trained.data_states.get(name, {}), digests)):
            warnings.warn(changes, stacklevel=2)
        return parts_of(found.__getitems__(list(range(len(found))))), found.numbers, None
    data, keys = build_data(settings)
    splits = _SPLITS[:-1] if split == "all" else (split,)
    if not isinstance(data, TensorDataModule):
        parts = _joined([part for name in splits for part in split_parts(data, name, keys)])
        return parts, torch.arange(len(parts.x), device="cpu"), None
    data.prepare_data()
    data.setup("test")
    if isinstance(data, SplitData) and split != "all":
        data.keep_split(trained.data_states.get(type(data).__qualname__, {}), other=other)
    rows = [getattr(data, name) for name in splits]
    parts = _joined([parts_of(part.__getitems__(list(range(len(part))))) for part in rows])
    numbers = torch.cat([part.numbers for part in rows]) if isinstance(data, SplitData) else None
    return parts, torch.arange(len(parts.x), device="cpu") if numbers is None else numbers, data


def _joined(parts: "list[Parts]") -> "Parts":
    weights = [part.weight for part in parts if part.weight is not None]
    return parts[0]._replace(
        x=torch.cat([part.x for part in parts]),
        context=joined_contexts(part.context for part in parts),
        weight=torch.cat(weights) if weights else None,
    )


def _expect(fabric: "Fabric", density: FlowDensity, parts: "Parts", size: int, max_minutes: float | None) -> None:
    """Report how long the evaluation will take, if that is long."""
    x, rows = parts.x[:size].to(fabric.device), -(-len(parts.x) // fabric.world_size)
    context = mapped(lambda leaf: leaf.to(fabric.device), context_rows(parts.context, slice(size)))
    notice = expect(density.to(fabric.device), x, context, rows, "the evaluation", max_minutes, _CHEAPER)
    if notice and fabric.is_global_zero:
        print(notice, flush=True)


def _check_within(density: FlowDensity, rows: Tensor, numbers: Tensor) -> None:
    """Refuse rows beyond the bounds that the density was trained with.

    Raises:
        ConfigError: with their numbers. Their density is zero, so the mean of all log-densities would be -inf.
    """
    outside = torch.cat([density.transform(part, values=False)[1].isneginf() for part in rows.split(10_000)])
    if not outside.any():
        return
    first = int(outside.nonzero()[0])
    shown = ", ".join(f"{value:g}" for value in rows[first].flatten()[:6].tolist())
    raise ConfigError(
        f"{int(outside.sum())} of {len(rows)} rows are at or beyond the bounds of the density, where it is zero, so the mean log-density "
        f"would be -inf: the first is row {int(numbers[first])} ({shown}{', ...' if rows[first].numel() > 6 else ''}). Drop these rows"
    )


@torch.no_grad()
def _evaluated(
    fabric: "Fabric",
    density: FlowDensity,
    parts: "Parts",
    data: "TensorDataModule | None",
    size: int,
    seed: int | None,
) -> dict[str, Tensor]:
    """Values of every row by name, `(n,)`, NaN where unknown. Each process evaluates its share of the batches.

    Each batch has its own noise, so that the numbers are the same for any number of processes.
    """
    from divflow.data.order import combined_seed
    from divflow.tasks.likelihood_values import likelihood_values

    seed = fabric.broadcast(torch.seed() if seed is None else seed)
    density = density.to(fabric.device)
    rows = parts.x
    found = torch.zeros(len(rows), len(_AVERAGED) + len(_VARIANCES), dtype=torch.float64, device="cpu")
    for number, part in enumerate(batches(len(rows), size, "Evaluating", shown=fabric.is_global_zero)):
        if number % fabric.world_size != fabric.global_rank:
            continue
        generator = Generator(fabric.device).manual_seed(combined_seed(seed, number))
        context = mapped(lambda leaf: leaf.to(fabric.device), context_rows(parts.context, part))
        batch = parts._replace(x=rows[part].to(fabric.device), context=context, weight=None)
        known = likelihood_values(density, batch, data, 1 if data is None else data.num_draws, generator)
        for i, name in enumerate((*_AVERAGED, *_VARIANCES)):
            value = known.get(name)
            found[part, i] = math.nan if value is None else value.to(found)
    gathered: Any = fabric.all_reduce(found.to(fabric.device), reduce_op="sum")
    values = dict(zip((*_AVERAGED, *_VARIANCES), gathered.cpu().unbind(dim=1), strict=True))
    return values | {"log_prob": -values["nll"], "standard_error": values["estimator_variance"].sqrt()}


def _metrics(
    values: dict[str, Tensor], weight: Tensor | None, bit_per_dim: float | None, warn: bool
) -> dict[str, float]:
    """Means with their standard errors, by weight if rows have one, by the names of a run's results; `warn`: warn of a large quadrature error."""
    from divflow.tasks.metrics import MeanWithStandardError, summarized, warn_of_quadrature

    averages: dict[str, MeanWithStandardError] = {}
    for name in (*_AVERAGED, *_VARIANCES):
        if not values[name].isnan().any():
            averages[name] = MeanWithStandardError(shared=False)  # every process has all values
            averages[name].update(values[name], weight)
    found = summarized(averages, bit_per_dim, errors=True)
    if warn:
        warn_of_quadrature(found, _FINER)
    return {name: value.item() for name, value in found.items()}


def _print(metrics: dict[str, float], title: str, out: Path) -> None:
    console = Console()
    console.print(metrics_table(metrics, title))
    console.print(f"Log-densities, in nats: {out}", soft_wrap=True, highlight=False)

"""`divflow evaluate`: the log-density of every row of some data under a trained density."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import Generator, Tensor

from divflow.build import ConfigError
from divflow.cli.output import batches, check_output, write_table
from divflow.cli.trained import check_model, data_config, launched, load_trained, named_device, scaled_to_model
from divflow.density import FlowDensity, UnnormalizedDensity
from divflow.report import metrics_table

if TYPE_CHECKING:  # both import Lightning, and mistakes are told before
    from lightning.fabric import Fabric

    from divflow.data import TensorDataModule

__all__ = ["run"]

_SPLITS = ("train", "val", "test", "all")
# The columns of the file; those that are known of discrete data only are left out for others.
_COLUMNS = ("log_prob", "standard_error", "quadrature_error")
_DISCRETE = ("bits_per_dim", "bits_per_dim_importance_weighted")
_AVERAGED = ("nll", "gap", *_DISCRETE, "nfe", "nfe_divergence", "quadrature_error")
_VARIANCES = ("estimator_variance", "dequantization_variance")


def run(config: DictConfig) -> float:
    """Evaluate, as `configs/evaluate.yaml` composes it, and return the mean negative log-likelihood in nats."""
    check_model(config)
    out = check_output(config.out, (".csv", ".npy"), config.overwrite)
    if config.split not in _SPLITS:
        raise ConfigError(f"there is no split {config.split!r}; it must be one of {', '.join(_SPLITS)}")
    named_device(config.device, several=True)
    trained = load_trained(config)
    if isinstance(trained.density, UnnormalizedDensity):
        raise ConfigError(f"{trained.name} is a score without SDE, which has no log-density; sample from it instead")
    settings = data_config(config, trained.columns)
    rows, context, data = _rows(settings, config.split)
    density = scaled_to_model(trained.density, config.data_range, None if data is None else data.levels, trained.name)
    shape = tuple(trained.density.flow.event_shape)
    if tuple(rows.shape[1:]) != shape:
        raise ConfigError(
            f"the data are events of shape {tuple(rows.shape[1:])}, but {trained.name} was trained on {shape}: "
            "the columns, or data.event_shape, must be those of the training"
        )
    size = config.batch_size or settings.get("eval_batch_size") or settings.get("batch_size", 1000)
    fabric = launched(config.device)
    values = _judged(fabric, density, (rows, context), data, size, config.seed)
    metrics = _metrics(values, None if data is None else data.bit_per_dim)
    if fabric.is_global_zero:
        names = [name for name in (*_COLUMNS, *_DISCRETE) if name in _COLUMNS or not values[name].isnan().all()]
        write_table(out, names, torch.stack([values[name] for name in names], dim=1).numpy())
        _print(metrics, f"{trained.name}: {len(rows)} rows, split {config.split}", out)
    fabric.barrier()
    return metrics["nll"]


def _rows(settings: dict[str, Any], split: str) -> tuple[Tensor, Tensor | None, Any]:
    """The rows of a split, with their context if they have one, and their data module. All rows of a file are those of the file, in its order."""
    from divflow.data import Table  # here, since it imports Lightning
    from divflow.data.module import TensorDataModule, check_finite, split_context
    from divflow.data.table import read_table

    if split == "all" and settings["_target_"] in ("divflow.data.Table", f"{Table.__module__}.Table"):
        rows, names = read_table(settings["path"], settings.get("columns"), settings.get("separator", ","))
        check_finite(rows, names)
        return rows, None, None
    data = instantiate(settings, _convert_="all")
    if not isinstance(data, TensorDataModule):
        raise ConfigError(f"data._target_={settings['_target_']} made a {type(data).__name__}, not a TensorDataModule")
    data.prepare_data()
    data.setup("test")
    parts = [getattr(data, name) for name in (_SPLITS[:-1] if split == "all" else (split,))]
    found = [split_context(part.__getitems__(list(range(len(part))))) for part in parts]
    rows, context = torch.cat([rows for rows, _ in found]), [context for _, context in found if context is not None]
    return rows, torch.cat(context) if context else None, data


@torch.no_grad()
def _judged(
    fabric: "Fabric",
    density: FlowDensity,
    split: tuple[Tensor, Tensor | None],
    data: "TensorDataModule | None",
    size: int,
    seed: int | None,
) -> dict[str, Tensor]:
    """What is known of every row, by name, `(n,)`; NaN where it is not. Each process takes its share of the batches.

    A batch has noise of its own, so that the numbers are the same for any number of processes.
    """
    from divflow.data.order import combined_seed
    from divflow.tasks.judging import judge_likelihood

    seed = fabric.broadcast(torch.seed() if seed is None else seed)
    density = density.to(fabric.device)
    rows, context = split
    found = torch.zeros(len(rows), len(_AVERAGED) + len(_VARIANCES), dtype=torch.float64, device="cpu")
    for number, part in enumerate(batches(len(rows), size, "Evaluating", shown=fabric.is_global_zero)):
        if number % fabric.world_size != fabric.global_rank:
            continue
        generator = Generator(fabric.device).manual_seed(combined_seed(seed, number))
        x = rows[part].to(fabric.device)
        batch = x if context is None else (x, context[part].to(fabric.device))
        judged = judge_likelihood(density, batch, data, 1 if data is None else data.num_draws, generator)
        for i, name in enumerate((*_AVERAGED, *_VARIANCES)):
            value = judged.get(name)
            found[part, i] = math.nan if value is None else value.to(found)
    gathered: Any = fabric.all_reduce(found.to(fabric.device), reduce_op="sum")
    values = dict(zip((*_AVERAGED, *_VARIANCES), gathered.cpu().unbind(dim=1), strict=True))
    return values | {"log_prob": -values["nll"], "standard_error": values["estimator_variance"].sqrt()}


def _metrics(values: dict[str, Tensor], bit_per_dim: float | None) -> dict[str, float]:
    """Means with their standard errors, by the names of a run's results."""
    from divflow.tasks.metrics import MeanWithStandardError, summarized

    averages: dict[str, MeanWithStandardError] = {}
    for name in (*_AVERAGED, *_VARIANCES):
        if not values[name].isnan().any():
            averages[name] = MeanWithStandardError()
            averages[name].update(values[name])
    return {name: value.item() for name, value in summarized(averages, bit_per_dim, errors=True).items()}


def _print(metrics: dict[str, float], title: str, out: Path) -> None:
    console = Console()
    console.print(metrics_table(metrics, title))
    console.print(f"Log-densities, in nats: {out}", soft_wrap=True, highlight=False)

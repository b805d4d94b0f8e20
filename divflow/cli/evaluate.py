"""`divflow evaluate`: the log-density of every row of some data under a trained density."""

import math
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import Generator, Tensor

from divflow.build import ConfigError
from divflow.cli.output import batches, check_output, write_table
from divflow.cli.trained import check_model, data_config, load_trained
from divflow.density import FlowDensity, UnnormalizedDensity
from divflow.report import metrics_table

__all__ = ["run"]

_SPLITS = ("train", "val", "test", "all")
_COLUMNS = ("log_prob", "standard_error", "quadrature_error")


def run(config: DictConfig) -> float:
    """Evaluate, as `configs/evaluate.yaml` composes it, and return the mean negative log-likelihood in nats."""
    check_model(config)
    out = check_output(config.out, (".csv", ".npy"), config.overwrite)
    if config.split not in _SPLITS:
        raise ConfigError(f"there is no split {config.split!r}; it must be one of {', '.join(_SPLITS)}")
    trained = load_trained(config)
    if isinstance(trained.density, UnnormalizedDensity):
        raise ConfigError(f"{trained.name} is a score without SDE, which has no log-density; sample from it instead")
    settings = data_config(config, trained.columns)
    rows, data = _rows(settings, config.split)
    shape = tuple(trained.density.flow.event_shape)
    if tuple(rows.shape[1:]) != shape:
        raise ConfigError(
            f"the data are events of shape {tuple(rows.shape[1:])}, but {trained.name} was trained on {shape}: "
            "the columns, or data.event_shape, must be those of the training"
        )
    size = config.batch_size or settings.get("eval_batch_size") or settings.get("batch_size", 1000)
    values = _judged(trained.density, rows, size, torch.seed() if config.seed is None else config.seed)
    write_table(out, _COLUMNS, torch.stack([values[name] for name in _COLUMNS], dim=1).numpy())
    metrics = _metrics(values, None if data is None else data.log_prob(rows), getattr(data, "levels", None), shape)
    _print(metrics, f"{trained.name}: {len(rows)} rows, split {config.split}", out)
    return metrics["nll"]


def _rows(settings: dict[str, Any], split: str) -> tuple[Tensor, Any]:
    """The rows of a split and their data module. All rows of a file are those of the file, in its order."""
    from divflow.data import Table  # here, since it imports Lightning
    from divflow.data.module import TensorDataModule, check_finite
    from divflow.data.table import read_table

    if split == "all" and settings["_target_"] in ("divflow.data.Table", f"{Table.__module__}.Table"):
        rows, names = read_table(settings["path"], settings.get("columns"))
        check_finite(rows, names)
        return rows, None
    data = instantiate(settings, _convert_="all")
    if not isinstance(data, TensorDataModule):
        raise ConfigError(f"data._target_={settings['_target_']} made a {type(data).__name__}, not a TensorDataModule")
    data.prepare_data()
    data.setup("test")
    parts = [getattr(data, name) for name in (_SPLITS[:-1] if split == "all" else (split,))]
    return torch.cat([part.__getitems__(list(range(len(part)))) for part in parts]), data


@torch.no_grad()
def _judged(density: FlowDensity, rows: Tensor, size: int, seed: int) -> dict[str, Tensor]:
    """What is known of every row, by name, `(n,)`; NaN where it is not."""
    from divflow.data.order import combined_seed

    device = next((tensor.device for tensor in density.state_dict().values()), torch.device("cpu"))
    found: dict[str, list[Tensor]] = {name: [] for name in (*_COLUMNS, "nfe", "nfe_divergence")}
    for number, part in enumerate(batches(len(rows), size, "Evaluating")):
        generator = Generator(device).manual_seed(combined_seed(seed, number))
        result = density.evaluate(rows[part].to(device), generator=generator)
        for name in _COLUMNS:
            value = getattr(result, name)
            found[name].append(torch.full_like(result.log_prob, math.nan) if value is None else value)
        for name, count in {"nfe": "forward", "nfe_divergence": "divergence"}.items():
            found[name].append(torch.full_like(result.log_prob, getattr(result.evaluations, count)))
    return {name: torch.cat(values).cpu() for name, values in found.items()}


def _metrics(
    values: dict[str, Tensor], truth: Tensor | None, levels: int | None, shape: tuple[int, ...]
) -> dict[str, float]:
    """Means with their standard errors, by the names of a run's results."""
    values = {name: value.double() for name, value in values.items()}
    count, nll = len(values["log_prob"]), -values["log_prob"]
    averaged = {"nll": nll} | ({} if truth is None else {"gap": truth.double() + nll})
    metrics = {name: value.mean().item() for name, value in averaged.items()}
    metrics |= {f"{name}_standard_error": (value.std() / count**0.5).item() for name, value in averaged.items()}
    variance = values["standard_error"].square().mean().item()
    if variance > 0:  # neither exact nor unknown
        metrics |= {"estimator_error": variance**0.5, "nll_estimator_error": (variance / count) ** 0.5}
    metrics |= {name: values[name].mean().item() for name in ("nfe", "nfe_divergence")}
    if not values["quadrature_error"].isnan().any():
        metrics["quadrature_error"] = values["quadrature_error"].mean().item()
    if levels is not None:
        unit = math.prod(shape) * math.log(2)
        scaled = [name for name in metrics if name.startswith("nll_")]
        metrics |= {name.replace("nll", "bits_per_dim"): metrics[name] / unit for name in scaled}
        metrics["bits_per_dim"] = metrics["nll"] / unit + math.log2(levels)
    return metrics


def _print(metrics: dict[str, float], title: str, out: Path) -> None:
    console = Console()
    console.print(metrics_table(metrics, title))
    console.print(f"Log-densities, in nats: {out}", soft_wrap=True, highlight=False)

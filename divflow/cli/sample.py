"""`divflow sample`: samples of a trained density, in the units of its data."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import Generator, Tensor

from divflow.build import ConfigError
from divflow.cli.output import batches, check_output, write_figure, write_table
from divflow.cli.trained import (
    check_least,
    check_model,
    data_config,
    load_trained,
    named_device,
    scaled_to_model,
)
from divflow.density import FlowDensity, ScoreDensity, UnnormalizedDensity, in_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]


def run(config: DictConfig) -> None:
    """Sample, as `configs/sample.yaml` composes it."""
    check_model(config)
    out = check_output(config.out, (".csv", ".npy", ".png"), config.overwrite)
    check_least("num_samples", config.num_samples, 1)
    device = named_device(config.device)
    trained = load_trained(config)
    trained.density.to(device)
    data = data_config(config, trained.columns) if out.suffix == ".png" else None  # refused before the work is done
    seed = torch.seed() if config.seed is None else config.seed
    context = _context(config.context, trained.density)
    if data is not None and context is not None:
        raise ConfigError(
            f"out={config.out} would show samples of one context beside data of all; write them by out=samples.csv or .npy"
        )
    samples = _drawn(trained.density, config.num_samples, config.batch_size or config.num_samples, seed, context)
    names = trained.columns or [f"x{i + 1}" for i in range(samples[0].numel())]
    if data is None:
        write_table(out, names, samples.numpy())
    else:
        write_figure(out, _figure(data, trained.density, samples, names))
    Console().print(f"{len(samples)} samples of {trained.name}: {out}", soft_wrap=True, highlight=False)


def _context(numbers: Any, density: FlowDensity | UnnormalizedDensity) -> Tensor | None:
    """The context of all samples, `(features,)`; None where none is given.

    Raises:
        ConfigError: it is no list of numbers; a density that needs one, or takes none.
    """
    standardized = getattr(density, "context_transform", None)
    if numbers is None:
        if standardized is not None:
            raise ConfigError(
                f"the density is conditional: give the context of its samples, {standardized.shift.numel()} numbers, context=[0.1,...]"
            )
        return None
    if not isinstance(density, FlowDensity) or isinstance(density, ScoreDensity):
        raise ConfigError(f"scores take no context, but context={numbers}")
    try:
        # In the digits that it is given in, where it is standardized first.
        dtype = density.dtype if standardized is None else torch.float64
        context = torch.tensor([float(number) for number in numbers], dtype=dtype, device="cpu")
    except (TypeError, ValueError):
        context = torch.tensor([math.nan], device="cpu")
    if not context.isfinite().all():
        raise ConfigError(f"context must be a list of numbers, such as [0.1,-0.3], but is {numbers}")
    return context


@torch.no_grad()
def _drawn(
    density: FlowDensity | UnnormalizedDensity, number: int, size: int, seed: int, context: Tensor | None
) -> Tensor:
    """Samples `(n, *event)`, all of one context if there is one.

    What follows a flow starts from noise that is drawn for all rows at once, so that a row is the same, as exactly as
    the solver has it, in batches of any size. A sampler with noise of its own has its own seed for every batch.
    """
    from divflow.data.order import combined_seed

    device = next((tensor.device for tensor in density.state_dict().values()), torch.device("cpu"))
    if isinstance(density, FlowDensity) and getattr(density, "sampler", None) is None:
        noise = density.flow.sample_base(number, Generator(device).manual_seed(seed))

        def draw(part: slice, index: int) -> Tensor:
            z = noise[part]
            given = None if context is None else density.flow_context(context.to(z.device).expand(len(z), -1))
            return in_units(density.transform, density.flow.decode(z, given))
    else:

        def draw(part: slice, index: int) -> Tensor:
            own = Generator(device).manual_seed(combined_seed(seed, index))
            return density.sample(part.stop - part.start, generator=own)

    return torch.cat([draw(part, index).cpu() for index, part in enumerate(batches(number, size, "Sampling"))])


def _figure(
    settings: dict[str, Any], density: FlowDensity | UnnormalizedDensity, samples: Tensor, names: Sequence[str]
) -> "Figure":
    """The samples beside data that were held out."""
    from divflow.figures import (  # here, since it takes a while to import
        plot_energies,
        plot_images,
        plot_pairs,
        plot_plane,
    )

    data = instantiate(settings, _convert_="all")
    data.prepare_data()
    data.setup("test")
    rows = data.test.__getitems__(list(range(min(len(samples), len(data.test)))))
    if data.images:
        if isinstance(density, FlowDensity):
            unit = scaled_to_model(density, None, data.levels, "the model")
            if unit is not density:  # of a model whose pixels are not between 0 and 1
                samples = unit.transform.inverse(samples)
        return plot_images(rows, samples)
    if tuple(data.event_shape) == (2,):
        device = next((tensor.device for tensor in density.state_dict().values()), torch.device("cpu"))
        return plot_plane(rows.to(device), samples, getattr(density, "log_prob", None))
    if data.energy is not None:
        return plot_energies(rows, samples, None, data.energy)
    return plot_pairs(rows.flatten(1), samples.flatten(1), names)

"""`divflow sample`: samples of a trained density, in the units of its data."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Generator, Tensor

from divflow.cli.output import batches, check_output, write_figure, write_table
from divflow.cli.trained import (
    Trained,
    check_least,
    check_model,
    data_config,
    load_trained,
    named_device,
    names_other_data,
    scaled_to_model,
    warn_of_changed_table,
)
from divflow.flow import FlowDensity
from divflow.flow.data_density import in_units
from divflow.flow.named_context import in_order
from divflow.operators.context import Context, mapped
from divflow.saved.build import ConfigError
from divflow.score import ScoreDensity, UnnormalizedDensity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]

# Images are discrete data, whatever the number of their levels.
_ANY_LEVELS = 256


def run(config: DictConfig) -> None:
    """Sample from a trained density, as `configs/sample.yaml` composes it, and write the samples.

    Raises:
        DivflowError: a setting, the checkpoint, the data or the solve is not what it needs to be.
    """
    check_model(config)
    out = check_output(config.out, (".csv", ".npy", ".png"), config.overwrite)
    check_least("num_samples", config.num_samples, 1)
    device = named_device(config.device)
    trained = load_trained(config, with_data=False)
    trained.density.to(device)
    drawn, pictures = out.suffix == ".png", _are_pictures(trained.density)
    data = data_config(config, trained) if drawn and not pictures else None  # so that it is refused before the work
    seed = torch.seed() if config.seed is None else config.seed
    given = OmegaConf.to_container(config.context) if OmegaConf.is_config(config.context) else config.context
    context = _context(given, trained.density)
    if data is not None and context is not None:
        raise ConfigError(
            f"a figure would show samples of one context beside data of all contexts, but out={config.out}. Write the samples by out=samples.csv or out=samples.npy"
        )
    samples = _drawn(trained.density, config.num_samples, config.batch_size or config.num_samples, seed, context)
    coordinates = getattr(trained.density, "coordinates", None)
    written = samples if coordinates is None else coordinates.rows(samples)
    names = trained.columns or [f"x{i + 1}" for i in range(written[0].numel())]
    if drawn and pictures:
        write_figure(out, _grid(trained.density, samples))
    elif data is None:
        warn_of_changed_table(config, trained)
        write_table(out, names, written.numpy(), trained.whole)
    else:
        write_figure(out, _figure(data, trained, names_other_data(config), samples, names))
    Console().print(f"{len(samples)} samples of {trained.name}: {out}", soft_wrap=True, highlight=False)


def _context(numbers: Any, density: FlowDensity | UnnormalizedDensity) -> Context | None:
    """Context of all samples, `(features,)`, or a dict for a velocity of your own that takes one; None if none is given.

    Raises:
        ConfigError: it is neither a list of numbers nor numbers by the names of its columns, nor a number for one column; the density
            needs one and none is given, or takes none.
        FieldError: names that are not those of its columns.
    """
    standardized, columns = getattr(density, "context_transform", None), getattr(density, "context_columns", None)
    if numbers is None:
        if standardized is not None:
            raise ConfigError(
                f"the density is conditional, but no context was given. Give {_asked(standardized.shift.numel(), columns)}"
            )
        return None
    if not isinstance(density, FlowDensity) or isinstance(density, ScoreDensity):
        raise ConfigError(f"scores take no context, but context={numbers}. Leave it out")
    if isinstance(numbers, Mapping) and not columns and standardized is None:
        return {str(name): _tensor(name, value, density) for name, value in numbers.items()}
    if isinstance(numbers, Mapping):
        if not columns:
            raise ConfigError(
                f"context={numbers} gives names, but the columns of the context are unnamed. Give a list, as context=[0.1,...]"
            )
        odd = {str(name): it for name, it in numbers.items() if isinstance(it, bool) or not isinstance(it, int | float)}
        if odd and odd.keys() <= set(columns):
            name, value = next(iter(odd.items()))
            raise ConfigError(f'{name} of the context must be a number, as "context={{{name}: 0.1}}", but is {value!r}')
        numbers = in_order(numbers, columns)
    if isinstance(numbers, int | float) and standardized is not None and standardized.shift.numel() == 1:
        numbers = [numbers]
    try:
        if isinstance(numbers, str):  # each letter of which may be a number
            raise TypeError
        # With all given digits, if it is standardized first.
        dtype = density.dtype if standardized is None else torch.float64
        context = torch.tensor([float(number) for number in numbers], dtype=dtype, device="cpu")
    except (TypeError, ValueError):
        context = torch.tensor([math.nan], device="cpu")
    if not context.isfinite().all():
        asked = "a list of numbers, such as [0.1,-0.3]"
        if standardized is not None:
            asked = _asked(standardized.shift.numel(), columns)
        raise ConfigError(f"context must be {asked}, but is {numbers!r}")
    return context


def _asked(count: int, columns: Sequence[str] | None) -> str:
    named = f" ({', '.join(columns)})" if columns else ""
    by_name = f' or "context={{{", ".join(f"{name}: 0.1" for name in columns)}}}"' if columns else ""
    many = (
        f"1 number{named}, as context=0.1" if count == 1 else f"a list of {count} numbers{named}, as context=[0.1,...]"
    )
    return many + by_name


def _tensor(name: Any, value: Any, density: FlowDensity) -> Tensor:
    """A number, or a list of them, for one sample; whole numbers stay integers, as labels are."""
    try:
        found = torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"context.{name} must be a number or a list of numbers, but is {value!r}") from error
    return found.to(density.dtype) if found.is_floating_point() else found


@torch.no_grad()
def _drawn(
    density: FlowDensity | UnnormalizedDensity, number: int, size: int, seed: int, context: Context | None
) -> Tensor:
    """Samples `(n, *event)`, all of one context if there is one.

    A flow starts from noise that is drawn for all rows at once, so a row is the same in batches of any size, up to the precision
    of the solver. A sampler with noise of its own gets a seed for every batch.
    """
    from divflow.data.order import combined_seed

    device = next((tensor.device for tensor in density.state_dict().values()), torch.device("cpu"))
    if isinstance(density, FlowDensity) and getattr(density, "sampler", None) is None:
        noise = density.flow.sample_base(number, Generator(device).manual_seed(seed))

        def draw(part: slice, index: int) -> Tensor:
            z = noise[part]
            given = density.flow_context(mapped(lambda leaf: leaf.to(z.device).expand(len(z), *leaf.shape), context))
            return in_units(density.transform, density.flow.decode(z, given))
    else:

        def draw(part: slice, index: int) -> Tensor:
            own = Generator(device).manual_seed(combined_seed(seed, index))
            return density.sample(part.stop - part.start, generator=own)

    return torch.cat([draw(part, index).cpu() for index, part in enumerate(batches(number, size, "Sampling"))])


def _are_pictures(density: FlowDensity | UnnormalizedDensity) -> bool:
    """Whether the shape of samples shows that they are images, grey or of three colours, which are drawn without data."""
    shape = tuple(density.flow.event_shape) if isinstance(density, FlowDensity) else ()
    return len(shape) == 3 and shape[0] in (1, 3)


def _grid(density: FlowDensity | UnnormalizedDensity, samples: Tensor) -> "Figure":
    """Figure of images alone, converted to [0, 1] if the model's pixels are in another range."""
    from divflow.callbacks.plots import plot_grid  # here, since it takes a while to import

    if isinstance(density, FlowDensity):
        unit = scaled_to_model(density, None, _ANY_LEVELS, "the model")
        samples = samples if unit is density else unit.transform.inverse(samples)
    return plot_grid(samples)


def _figure(settings: dict[str, Any], trained: Trained, other: bool, samples: Tensor, names: Sequence[str]) -> "Figure":
    """Figure of the samples beside held-out data, unless these are other data; images alone."""
    from divflow.callbacks.manifold_plots import plot_on_manifold
    from divflow.callbacks.plots import plot_energies, plot_pairs, plot_plane
    from divflow.data.batch import parts_of
    from divflow.data.module import TensorDataModule
    from divflow.data.split import SplitData
    from divflow.runs.data import build_data

    density, (data, _) = trained.density, build_data(settings)
    if not isinstance(data, TensorDataModule):
        raise ConfigError(
            f"a figure needs one of divflow's data modules, but the data are a {type(data).__name__}. Write the samples by out=samples.csv or out=samples.npy"
        )
    data.prepare_data()
    data.setup("test")
    if isinstance(data, SplitData):
        data.keep_split(trained.data_states.get(type(data).__qualname__, {}), other=other)
    rows = parts_of(data.test.__getitems__(list(range(min(len(samples), len(data.test)))))).x
    if data.images:
        return _grid(density, samples)
    device = next((tensor.device for tensor in density.state_dict().values()), torch.device("cpu"))
    log_prob = getattr(density, "log_prob", None)
    if data.manifold is not None:
        return plot_on_manifold(
            data.manifold, rows.to(device), samples, None if data.context_features else log_prob, names
        )
    if tuple(data.event_shape) == (2,):
        return plot_plane(rows.to(device), samples, log_prob)
    if data.energy is not None:
        return plot_energies(rows, samples, None, data.energy)
    return plot_pairs(rows.flatten(1), samples.flatten(1), names)

"""Data that are probably in other units than a density's: a warning, because no mathematics forbids them."""

import warnings
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from divflow.distributions.base_density import BaseDensity

__all__ = ["UnitsWarning", "warn_of_far_context", "warn_of_far_data", "warn_of_range"]

# The model's own samples, with which data are compared.
_OWN = 1_000
# Rows from which units are inferred: fewer may have been chosen because they are far away, or be dark pictures.
_FEWEST = 8


class UnitsWarning(UserWarning):
    """Data are probably in other units than those of the density."""


@torch.no_grad()
def warn_of_range(x: Tensor, data_range: tuple[float, float]) -> None:
    """Warn about data far beyond the range that a model was trained on, or that fill at most half of it.

    Args:
        x: data `(k, *event)`, in the model's units.
        data_range: that of the model's data, low and high.
    """
    if x.numel() == 0:
        return
    (low, high), (least, most) = data_range, _read(*x.aminmax())
    width = high - low
    if least < low - width / 2 or most > high + width / 2:
        what = "reach beyond that"
    elif len(x) >= _FEWEST and most - least <= width / 2:
        what = "fill no more than half of that"
    else:
        return
    warnings.warn(
        f"the model was trained on data from {low:g} to {high:g}, but these are from {least:g} to {most:g}, which {what}: are they in "
        f"its units? FlowDensity(flow, Affine.between((0, 1), ({low:g}, {high:g}))) converts pixels from 0 to 1, with the "
        "log-determinant; so does divflow evaluate for images, given data_range.",
        UnitsWarning,
        stacklevel=4,
    )


@torch.no_grad()
def warn_of_far_context(context: Tensor, context_range: Sequence[Sequence[float]], names: Sequence[str] | None) -> None:
    """Warn of contexts that are farther outside of those of the training than half of their range.

    Args:
        context: contexts `(k, features)`.
        context_range: the least and the largest of each feature in training.
        names: names of the features, if they are known.
    """
    if torch.compiler.is_compiling() or not len(context):
        return
    low, high = (context.new_tensor(end) for end in context_range)
    away = torch.maximum(low - context, context - high) - (high - low) / 2
    try:
        rows, features = away.argmax(dim=0).tolist(), (away > 0).any(dim=0).nonzero().flatten().tolist()
    except RuntimeError:  # nothing can be read, as inside `torch.vmap`
        return
    if features:
        shown = [
            f"{names[i] if names else f'entry {i} of the context'}={context[rows[i], i]:g} lies outside the training data's {low[i]:g} to {high[i]:g}"
            for i in features
        ]
        warnings.warn(f"{'; '.join(shown)}. The density there is extrapolated.", UnitsWarning, stacklevel=5)


@torch.no_grad()
def warn_of_far_data(base: BaseDensity, latent: Tensor, stacklevel: int = 4) -> None:
    """Warn if most rows are farther from the base, at its end of the flow, than all of the model's own samples.

    Args:
        base: of the flow.
        latent: the data at the base's end, `(k, *event)`.
        stacklevel: of the warning.
    """
    if len(latent) < _FEWEST:
        return
    own = base.log_prob(base.sample(_OWN, Generator("cpu").manual_seed(0), latent.dtype))
    found = base.log_prob(latent.detach())
    least, middle = _read(own.min(), found.median())
    if not middle < least - 1e-3 * (1 + abs(least)):  # half of the rows at least are among them
        return
    warnings.warn(
        f"most of the {len(latent):,} rows are farther from the base than any of {_OWN:,} samples of the model's own: at the base's end "
        f"of the flow their median log-density is {middle:.5g}, and the lowest of the samples {least:.5g}. Check that the data have "
        "the units, the order and the range of those that the model was trained on.",
        UnitsWarning,
        stacklevel=stacklevel,
    )


def _read(*values: Tensor) -> tuple[float, float]:
    """Two numbers; NaN, which raises no warning, if nothing can be read, as inside `torch.vmap`."""
    if torch.compiler.is_compiling():
        return torch.nan, torch.nan
    try:
        first, second = (float(value) for value in values)
    except RuntimeError:
        return torch.nan, torch.nan
    return first, second

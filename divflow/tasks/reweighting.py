"""Estimates from samples of a flow, weighted towards the Boltzmann density of the data's energy."""

import warnings

import torch
from torch import Generator, Tensor

from divflow.data.module import TensorDataModule
from divflow.energies import DoubleWell
from divflow.errors import DivflowError
from divflow.flow import FlowDensity
from divflow.flow.importance import ImportanceWarning

__all__ = ["reweighted"]

# Effective samples below which standard errors are too small.
_FEWEST = 20


@torch.no_grad()
def reweighted(density: FlowDensity, data: TensorDataModule, generator: Generator | None = None) -> dict[str, float]:
    """Effective sample size, and estimates by weighted samples with their standard errors.

    | name | value |
    |---|---|
    | `effective_sample_fraction` | 1 / (n sum W_i^2), from 1 / n to 1 |
    | `log_normalizer` | log Z in nats: right for any flow, and more precise the larger the fraction |
    | `free_energy_difference` | of the two wells of a double well, in kT |
    | `*_reference` | what the data module knows of the same value |

    Standard errors are those of the delta method. If few weights dominate, they are far too small; if one does, that of the free
    energy tends to zero. Do not trust them below 20 effective samples, which an `ImportanceWarning` reports.

    Args:
        density: flow with an exact divergence.
        data: data module with an energy.
        generator: of the samples.

    Returns:
        Values by name.

    Raises:
        DivflowError: the data have no energy.
        ImportanceError: the divergence is estimated.
    """
    energy = data.energy
    if energy is None:
        raise DivflowError(
            "samples are weighted towards the energy of the data, but these data have no energy. Use data=dw4 or data=lj13"
        )
    weights = density.importance_weights(
        lambda x: -energy(x), data.num_weighted, generator, batch_size=data.eval_batch_size
    )
    size = float(weights.effective_sample_size)
    if size < _FEWEST:
        warnings.warn(
            f"estimates by weighted samples rest on {size:.1f} effective samples of {data.num_weighted}, and below {_FEWEST} their standard errors "
            "are too small to be trusted. Take more samples by data.num_weighted, or a flow closer to the energy",
            ImportanceWarning,
            stacklevel=2,
        )
    found = {
        "effective_sample_fraction": size / data.num_weighted,
        "log_normalizer": float(weights.log_normalizer),
        "log_normalizer_standard_error": float(weights.standard_error),
    }
    if isinstance(energy, DoubleWell):
        share, error = _expectation(weights.log_weights.exp(), energy.extended(weights.samples))
        found["free_energy_difference"] = float(energy.free_energy_difference(share))
        found["free_energy_difference_standard_error"] = float(error / (share * (1 - share)))
    known = {f"{name}_reference": getattr(data, name, None) for name in ("log_normalizer", "free_energy_difference")}
    return found | {name: value for name, value in known.items() if value is not None}


def _expectation(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum_i W_i h_i and its standard error, sqrt(sum_i W_i^2 (h_i - mean)^2), by the delta method."""
    mean = weights @ values
    return mean, (weights.square() @ (values - mean).square()).sqrt()

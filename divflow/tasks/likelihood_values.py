"""Log-densities of a batch with their errors and costs, and those of discrete data through the noise that makes them continuous."""

import math
import warnings

import torch
from torch import Generator, Tensor

from divflow.data.batch import Batch, parts_of
from divflow.data.module import TensorDataModule
from divflow.flow import FlowDensity
from divflow.operators.context import Context

__all__ = ["likelihood_values"]

Values = dict[str, Tensor | None]


def likelihood_values(
    density: FlowDensity,
    batch: Batch,
    data: TensorDataModule | None = None,
    num_draws: int = 1,
    generator: Generator | None = None,
) -> Values:
    """Evaluate the log-density of each sample of a batch, with its errors and costs.

    For discrete data, values are averages over K draws of the dequantization noise. Let b_k = log p(y_k) - log q(u_k) for draw k of a
    sample; its mean gives the bits per dimension. The draws differ by the noise and the probes,

        var_k(b_k) / K = dequantization_variance + estimator_variance      in nats^2, in expectation

    and log mean_k exp(b_k) gives the importance-weighted bits per dimension. Estimated densities have no importance-weighted
    value, because the error of an estimate would raise it.

    Args:
        density: density to evaluate.
        batch: data `(k, *event)`, or data and context, as `parts_of` takes them.
        data: the data module, if it is one of divflow's.
        num_draws: K. The batch itself is the first draw.
        generator: of probes and noise; torch's default one if None.

    Returns:
        Values per sample `(k,)` by name, None where unknown: `nll` and `gap` (nats), `bits_per_dim`, `nfe` and `nfe_divergence`
        (evaluations), `quadrature_error` (nats), `estimator_variance` (nats^2), and the two of discrete data above.
    """
    x, context, _ = parts_of(batch)
    draws = [_one_draw(density, x, context, data, generator)]
    if data is None or data.bit_per_dim is None or num_draws == 1:
        return draws[0]
    draws += [_one_draw(density, data.redrawn(x, generator), context, data, generator) for _ in range(num_draws - 1)]
    values = {name: _mean([draw[name] for draw in draws]) for name in draws[0]}
    unit = data.bit_per_dim
    bounds = -unit * torch.stack([bits for draw in draws if (bits := draw["bits_per_dim"]) is not None])
    if values["estimator_variance"] is not None:
        values["estimator_variance"] = values["estimator_variance"] / num_draws
        values["dequantization_variance"] = bounds.var(dim=0) / num_draws - values["estimator_variance"]
    if density.flow.estimator.estimates:
        warnings.warn(
            f"importance-weighted bits per dimension are left out, because {density.flow.estimator} estimates the divergence. "
            "Use an exact divergence, estimator@evaluation.estimator=exact",
            stacklevel=2,
        )
    else:
        values["bits_per_dim_importance_weighted"] = (math.log(num_draws) - bounds.logsumexp(dim=0)) / unit
    return values


def _one_draw(
    density: FlowDensity, x: Tensor, context: Context | None, data: TensorDataModule | None, generator: Generator | None
) -> Values:
    result = density.evaluate(x, context, generator)
    truth = None if data is None else data.log_prob(x)
    nll, errors = -result.log_prob, result.standard_error
    return {
        "nll": nll,
        "bits_per_dim": None if data is None else data.bits_per_dim(result.log_prob, x),
        "gap": None if truth is None else truth - result.log_prob,
        "nfe": torch.full_like(nll, result.evaluations.forward),
        "nfe_divergence": torch.full_like(nll, result.evaluations.divergence),
        "quadrature_error": result.quadrature_error,
        "estimator_variance": None if errors is None else errors.square(),
    }


def _mean(values: list[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.stack(known).mean(dim=0) if known else None

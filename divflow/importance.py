"""Importance weights: expectations and normalizing constants under a target, from a flow's samples."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor

from divflow.arguments import check_count
from divflow.errors import DivflowError

if TYPE_CHECKING:
    from divflow.flow import ContinuousFlow

__all__ = ["ImportanceError", "ImportanceWeights", "importance_weights"]


class ImportanceError(DivflowError, ValueError):
    """The weights would not be what they claim; the message says why, and what to do."""


class ImportanceWeights(NamedTuple):
    """Samples x_i of a flow p, weighted towards a target f of which the normalization Z is not known.

        w_i = f(x_i) / p(x_i)      W_i = w_i / sum_j w_j      E_target[h] is about sum_i W_i h(x_i)

    Attributes:
        samples: x_i, `(n, *event)`.
        log_weights: log W_i, self-normalized: their exponentials sum to one, `(n,)`.
        effective_sample_size: 1 / sum_i W_i^2, in samples, from 1 (one weight outweighs all) to n (the flow is the
            target) (Kong 1992).
        log_normalizer: log Z-hat, Z-hat = (1 / n) sum_i w_i, in nats; Z-hat is unbiased, its logarithm low by about
            half of the squared standard error.
        standard_error: of log_normalizer, in nats, sqrt((n / effective_sample_size - 1) / (n - 1)), by the delta
            method; to be believed where the effective sample size is large.
    """

    samples: Tensor
    log_weights: Tensor
    effective_sample_size: Tensor
    log_normalizer: Tensor
    standard_error: Tensor


def importance_weights(
    flow: "ContinuousFlow",
    log_target: Callable[[Tensor], Tensor],
    num_samples: int,
    generator: Generator | None = None,
    *,
    context: Tensor | None = None,
    batch_size: int | None = None,
) -> ImportanceWeights:
    """Samples of a flow with their weights; samples and densities come from one solve.

    Differentiable in the flow's parameters; use `torch.no_grad()` where that is not wanted, to keep no graph.

    Args:
        flow: one whose divergence is exact.
        log_target: the logarithm of the target, up to a constant, of samples `(n, *event)`: `(n,)`, in nats; -inf where
            the target vanishes.
        num_samples: n, at least 2.
        generator: of the samples.
        context: one row a sample, for a conditional flow.
        batch_size: samples a solve, which bounds the memory; all at once if None.

    Raises:
        ImportanceError: a stochastic estimator; a context of another number of rows; a target of another shape, NaN, infinite, or zero at all samples.
        ValueError: fewer than 2 samples, or a batch size that is no whole number of at least 1.
        FieldError, SolverError: as `ContinuousFlow.log_prob`.
    """
    check_count("num_samples", num_samples, least=2)
    if flow.estimator.stochastic:
        raise ImportanceError(
            f"{flow.estimator} is unbiased for log p and not for 1 / p, so the weights would be wrong on average; use "
            "flow.replace(estimator=Exact())"
        )
    if context is not None and len(context) != num_samples:
        raise ImportanceError(f"context must have a row for each of {num_samples} samples, but has {len(context)}")
    if batch_size is not None:
        check_count("batch_size, unless it is None,", batch_size)
    size, parts = batch_size or num_samples, []
    for start in range(0, num_samples, size):
        given = None if context is None else context[start : start + size]
        count = min(size, num_samples - start)
        samples, log_prob = flow.rsample_and_log_prob(count, given, generator)
        parts.append((samples, log_prob, _checked_shape(log_target(samples), count)))
    samples, log_prob, target = (torch.cat(part) for part in zip(*parts, strict=True))
    _check_target(target)
    log_weights = target - log_prob
    total = log_weights.logsumexp(dim=0)
    normalized = log_weights - total
    effective = (-(2 * normalized).logsumexp(dim=0)).exp()
    error = ((num_samples / effective - 1).clamp_min(0) / (num_samples - 1)).sqrt()
    return ImportanceWeights(samples, normalized, effective, total - math.log(num_samples), error)


def _checked_shape(target: Tensor, num_samples: int) -> Tensor:
    if not isinstance(target, Tensor) or target.shape != (num_samples,):
        what = f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)
        raise ImportanceError(f"log_target must return one value a sample, ({num_samples},), but returned {what}")
    return target


def _check_target(target: Tensor) -> None:
    if (target.isnan() | target.isposinf()).any():
        raise ImportanceError("log_target returned NaN or +inf; it must be finite, or -inf where the target vanishes")
    if target.isneginf().all():
        raise ImportanceError(
            f"the target vanishes at all {len(target)} samples of the flow, so it has no weights; give more samples, "
            "or a flow that is nearer to the target"
        )

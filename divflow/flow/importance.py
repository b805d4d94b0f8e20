"""Importance weights: expectations and normalizing constants under a target, from a flow's samples."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.errors import DivflowError, check_count
from divflow.flow.evaluation import Flow
from divflow.operators.context import Context, context_rows, has_rows, named_tensors

__all__ = ["ImportanceError", "ImportanceWarning", "ImportanceWeights", "importance_weights"]


class ImportanceError(DivflowError, ValueError):
    """Importance weights that would be wrong; the message says why, and what to do."""


class ImportanceWarning(UserWarning):
    """So few weights count that the estimate and its standard error are unreliable."""


class ImportanceWeights(NamedTuple):
    """Samples x_i of a flow p, weighted towards a target f whose normalization Z is unknown.

        w_i = f(x_i) / p(x_i)      W_i = w_i / sum_j w_j      E_target[h] is about sum_i W_i h(x_i)

    Attributes:
        samples: x_i, `(n, *event)`.
        log_weights: log W_i, self-normalized: their exponentials sum to one, `(n,)`.
        effective_sample_size: 1 / sum_i W_i^2, in samples, from 1 (one weight dominates) to n (the flow is the target)
            (Kong 1992).
        log_normalizer: log Z-hat, Z-hat = (1 / n) sum_i w_i, in nats. Z-hat is unbiased; its logarithm is too low by about
            half of the squared standard error.
        standard_error: of log_normalizer, in nats, sqrt((n / effective_sample_size - 1) / (n - 1)), by the delta method;
            unreliable below an effective sample size of about 20, see `importance_weights`.
        probe_share: the fraction of the variance of log w_i that is noise of an estimated divergence: the mean of its
            squared standard errors over that variance. Zero if the divergence is exact. Near one, more probes would raise
            the effective sample size, and a better flow would not.
    """

    samples: Tensor
    log_weights: Tensor
    effective_sample_size: Tensor
    log_normalizer: Tensor
    standard_error: Tensor
    probe_share: Tensor


def importance_weights(
    flow: Flow,
    log_target: Callable[[Tensor], Tensor],
    num_samples: int,
    generator: Generator | None = None,
    *,
    context: Context | None = None,
    correct: bool = False,
    batch_size: int | None = None,
) -> ImportanceWeights:
    """Draw samples of a flow with weights towards a target, for expectations and the normalizing constant Z.

        w_i = f(x_i) / p(x_i),    log Z-hat = log (1 / n) sum_i w_i        in nats

    Samples and densities come from one solve. The result is differentiable in the flow's parameters; use `torch.no_grad()`
    to keep no graph.

    **An estimated divergence** gives log p + e with E[e] = 0, so weights are too large on average, by E[exp(-e)] =
    exp(s^2 / 2) for a normal e of variance s^2. Log Z and expectations are biased, and no number of samples shows it
    (arXiv 2601.21177). It is refused unless `correct` is set, which multiplies w_i by exp(-s_i^2 / 2), with s_i the
    standard error of log p(x_i). The correction assumes:

    - that e is normal, as the sum over many nodes and dimensions nearly is;
    - that s_i^2 is known. From m probes it has m - 1 degrees of freedom, and log Z stays too large by about
      s^4 / (4 (m - 1));
    - that s_i is unbiased. `XTrace`'s is too large if its terms are few.

    Two standard errors cover the error of log Z in 95 % of runs with an exact divergence. Corrected (200 samples) they
    cover 94 % with 8 probes (s = 0.4), 90 % with 2 (s = 0.8), and 91 % with `XTrace(8)` (s = 0.5).

    **Few effective samples**: standard errors only know what the flow has reached. If one weight dominates, that of log Z
    is at most 1 however wrong log Z is, and that of an expectation by the delta method, sqrt(sum_i W_i^2 (h_i - mean)^2),
    tends to zero. Both are unreliable below an effective sample size of about 20.

    Args:
        flow: with an exact divergence, or with at least two probes and `correct`.
        log_target: the logarithm of the target, up to a constant, of samples `(n, *event)`: `(n,)`, in nats; -inf where the
            target vanishes.
        num_samples: n, at least 2.
        generator: of the samples.
        context: a tensor or a tree of tensors, one row per sample, for a conditional flow.
        correct: subtracts half the variance of an estimated log p.
        batch_size: samples per solve, which bounds the memory; all at once if None.

    Raises:
        ImportanceError: a frozen estimator; a stochastic one that is not corrected, or does not know its error; a context
            of another number of rows; a target of another shape, or one that is NaN, infinite, or zero at all samples.
        ValueError: fewer than 2 samples, or a batch size that is not a whole number of at least 1.
        FieldError: as `ContinuousFlow.log_prob`.
        SolverError: as `ContinuousFlow.log_prob`.

    Example:
        >>> from divflow import ContinuousFlow
        >>> flow = ContinuousFlow(lambda t, x: 0.0 * x, 2)  # the standard normal
        >>> weights = importance_weights(flow, lambda x: -(x**2).sum(dim=1) / 2, 100)
        >>> torch.allclose(weights.log_normalizer, torch.tensor(2 * torch.pi).log())
        True
    """
    check_count("num_samples", num_samples, least=2)
    if flow.estimator.frozen:
        raise ImportanceError(
            f"{type(flow.estimator).__name__} has drawn its probes, so all batches would share them and the errors of the weights "
            "would not be independent. Use flow.replace(estimator=Exact()), or the estimator before freezing, with correct=True."
        )
    if flow.estimator.estimates and not correct:
        raise ImportanceError(
            f"{flow.estimator} is unbiased for log p but not for 1 / p, so the weights would be biased. Use "
            "flow.replace(estimator=Exact()), or correct=True, which assumes normal noise."
        )
    if not has_rows(context, num_samples):
        found = "; ".join(f"{place} has shape {tuple(leaf.shape)}" for place, leaf in named_tensors(context))
        raise ImportanceError(f"the context must have a row for each of {num_samples} samples, but {found}")
    if batch_size is not None:
        check_count("batch_size, unless it is None,", batch_size)
    parts = [
        _solved(flow, log_target, count, generator, context_rows(context, slice(start, start + count)))
        for start, count in _batches(num_samples, batch_size or num_samples)
    ]
    samples, log_prob, noise, target = (torch.cat(part) for part in zip(*parts, strict=True))
    _check_target(target)
    log_weights = target - log_prob
    share = _share(noise, log_weights.detach())
    log_weights = log_weights - noise / 2
    largest = log_weights.detach().amax()  # subtracted first, because a large constant in the target costs digits
    total = (log_weights - largest).logsumexp(dim=0)
    normalized = log_weights - largest - total
    size = (-(2 * normalized).logsumexp(dim=0)).exp()
    error = ((num_samples / size - 1).clamp_min(0) / (num_samples - 1)).sqrt()
    return ImportanceWeights(samples, normalized, size, total + largest - math.log(num_samples), error, share)


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """The start and the size of each batch."""
    return ((start, min(size, count - start)) for start in range(0, count, size))


def _solved(
    flow: Flow,
    log_target: Callable[[Tensor], Tensor],
    count: int,
    generator: Generator | None,
    context: Context | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples of one solve, log p, its variance by the probes, and the target."""
    samples, found = flow.rsample_and_evaluate(count, context, generator)
    if found.standard_error is None:
        raise ImportanceError(
            f"{flow.estimator} does not know its error, so its weights can't be corrected. Use at least two probes."
        )
    return samples, found.log_prob, found.standard_error.square(), _checked_shape(log_target(samples.clone()), count)


def _share(noise: Tensor, log_weights: Tensor) -> Tensor:
    """The fraction of the variance of the weights, where the target does not vanish; exactly zero without noise."""
    inside = log_weights.isfinite()
    if not noise.any():
        return noise.new_zeros(())
    return (noise[inside].mean() / log_weights[inside].var()).clamp(max=1)


def _checked_shape(target: Tensor, num_samples: int) -> Tensor:
    if isinstance(target, Tensor) and target.dtype == torch.bool:
        raise ImportanceError(
            "log_target returned a mask of torch.bool, not a logarithm. For a target that is uniform where the mask is true, "
            "return torch.where(mask, 0.0, -torch.inf)."
        )
    if not isinstance(target, Tensor) or target.shape != (num_samples,) or target.is_complex():
        what = f"shape {tuple(target.shape)} of {target.dtype}" if isinstance(target, Tensor) else repr(target)
        raise ImportanceError(
            f"log_target must return one real value per sample, ({num_samples},), but returned {what}"
        )
    return target


def _check_target(target: Tensor) -> None:
    if (target.isnan() | target.isposinf()).any():
        raise ImportanceError("log_target returned NaN or +inf. It must be finite, or -inf where the target vanishes.")
    if target.isneginf().all():
        raise ImportanceError(
            f"the target vanishes at all {len(target)} samples of the flow, so there are no weights. Use more samples, "
            "or a flow closer to the target."
        )

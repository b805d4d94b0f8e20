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
    """The weights would not be what they claim; the message says why, and what to do."""


class ImportanceWarning(UserWarning):
    """So few weights count that what they estimate, and its standard error, can't be believed."""


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
            method; not to be believed below an effective sample size of some 20, see `importance_weights`.
        probe_share: of the variance of log w_i, what the noise of an estimated divergence makes: the mean of its squared
            standard errors over that variance. Zero where the divergence is exact; near one, more probes would raise the
            effective sample size, and a better flow would not.
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
    """Samples of a flow with their weights; samples and densities come from one solve.

    **An estimated divergence** gives log p + e with E[e] = 0, so that weights are too large on average, by
    E[exp(-e)] = exp(s^2 / 2) for a normal e of variance s^2, and most where s is: log Z and expectations are biased, and
    no number of samples shows it (arXiv 2601.21177). It is refused, unless it is to be corrected: then w_i is multiplied by
    exp(-s_i^2 / 2), s_i the standard error of log p(x_i). The assumption is that e is normal, as the sum over many nodes
    and dimensions nearly is, and that s_i^2 is known: from m probes it has m - 1 degrees of freedom, and log Z stays
    too large by about s^4 / (4 (m - 1)). That s_i is unbiased matters, too: `XTrace`'s is too large where its terms are few.
    Two standard errors hold the error of log Z for 95 % of runs with an exact divergence, and corrected
    (200 samples) for 94 % with 8 probes (s = 0.4), 90 % with 2 (s = 0.8), and 91 % by `XTrace(8)` (s = 0.5).

    **Few effective samples**: standard errors know only what the flow has reached. Where one weight outweighs all, that of log Z is
    at most 1 however far off log Z is, and that of an expectation by the delta method, sqrt(sum_i W_i^2 (h_i - mean)^2), tends to zero.
    Below an effective sample size of some 20 neither is to be believed.

    Differentiable in the flow's parameters; use `torch.no_grad()` where that is not wanted, to keep no graph.

    Args:
        flow: one whose divergence is exact, or estimated by two probes at least if it is to be corrected.
        log_target: the logarithm of the target, up to a constant, of samples `(n, *event)`: `(n,)`, in nats; -inf where
            the target vanishes.
        num_samples: n, at least 2.
        generator: of the samples.
        context: a tensor or a tree of tensors, one row a sample, for a conditional flow.
        correct: for half the variance of an estimated log p.
        batch_size: samples a solve, which bounds the memory; all at once if None.

    Raises:
        ImportanceError: a frozen estimator; a stochastic one that is not corrected, or does not know its error; a context of another number of rows; a target of
            another shape, NaN, infinite, or zero at all samples.
        ValueError: fewer than 2 samples, or a batch size that is no whole number of at least 1.
        FieldError, SolverError: as `ContinuousFlow.log_prob`.
    """
    check_count("num_samples", num_samples, least=2)
    if flow.estimator.frozen:
        raise ImportanceError(
            f"{type(flow.estimator).__name__} has drawn its probes, which every batch would share, so that the weights' "
            "errors are not independent; use flow.replace(estimator=Exact()), or the estimator that was frozen, with correct=True"
        )
    if flow.estimator.estimates and not correct:
        raise ImportanceError(
            f"{flow.estimator} is unbiased for log p and not for 1 / p, so the weights would be wrong on average; use "
            "flow.replace(estimator=Exact()), or correct=True, which takes the noise for normal"
        )
    if not has_rows(context, num_samples):
        found = "; ".join(f"{place} has shape {tuple(leaf.shape)}" for place, leaf in named_tensors(context))
        raise ImportanceError(f"context must have a row for each of {num_samples} samples, but {found}")
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
    largest = log_weights.detach().amax()  # taken away first, for a large constant in the target leaves few digits
    total = (log_weights - largest).logsumexp(dim=0)
    normalized = log_weights - largest - total
    size = (-(2 * normalized).logsumexp(dim=0)).exp()
    error = ((num_samples / size - 1).clamp_min(0) / (num_samples - 1)).sqrt()
    return ImportanceWeights(samples, normalized, size, total + largest - math.log(num_samples), error, share)


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each batch starts, and how many it holds."""
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
            f"{flow.estimator} does not know its error, so its weights can't be corrected; use two probes at least"
        )
    return samples, found.log_prob, found.standard_error.square(), _checked_shape(log_target(samples.clone()), count)


def _share(noise: Tensor, log_weights: Tensor) -> Tensor:
    """Of the variance of weights, where the target does not vanish; exactly zero where there is no noise."""
    inside = log_weights.isfinite()
    if not noise.any():
        return noise.new_zeros(())
    return (noise[inside].mean() / log_weights[inside].var()).clamp(max=1)


def _checked_shape(target: Tensor, num_samples: int) -> Tensor:
    if isinstance(target, Tensor) and target.dtype == torch.bool:
        raise ImportanceError(
            "log_target returned a mask of torch.bool, which is no logarithm; for a target that is uniform where the mask holds, "
            "return torch.where(mask, 0.0, -torch.inf)"
        )
    if not isinstance(target, Tensor) or target.shape != (num_samples,) or target.is_complex():
        what = f"shape {tuple(target.shape)} of {target.dtype}" if isinstance(target, Tensor) else repr(target)
        raise ImportanceError(f"log_target must return one real value a sample, ({num_samples},), but returned {what}")
    return target


def _check_target(target: Tensor) -> None:
    if (target.isnan() | target.isposinf()).any():
        raise ImportanceError("log_target returned NaN or +inf; it must be finite, or -inf where the target vanishes")
    if target.isneginf().all():
        raise ImportanceError(
            f"the target vanishes at all {len(target)} samples of the flow, so it has no weights; give more samples, "
            "or a flow that is nearer to the target"
        )

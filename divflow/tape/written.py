"""Rules for operations that are followed through simpler ones: normalizations, softmax, gates.

A layer normalization is a standardization, which is an operation of its own with closed derivatives, times a weight. What is
written here need not be torch's own way, but must have its value: both are compared. The numbers that a group shares, a
mean and a scale, pass through `statistic`, by which others may be put in their place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from divflow.tape.listening import overridable
from divflow.tape.operation import Operation
from divflow.tape.rule import NoRule, Recorder, Rule
from divflow.tape.steps import Standardized

__all__ = ["NORMALIZATIONS", "WRITTEN", "Standardization", "Written", "standardize"]


@dataclass(frozen=True, eq=False)
class Written(Rule):
    """The rule of a function that simpler operations compute, which are followed one by one.

    Args:
        function: of the operation's arguments.
        fused: whether the value stays the operation's own; else it is the function's, which saves an evaluation.

    Example:
        >>> rule = Written(lambda u, weight: u / u.square().mean(-1, keepdim=True).sqrt() * weight)
    """

    function: Callable[..., Any]
    fused: bool = True

    @property
    def compares_values(self) -> bool:
        """Always: the function must have the operation's value."""
        return True

    def record(self, tape: Recorder, op: Operation) -> Any:
        """Evaluate the function, and the operation where its value stays."""
        written = tape.follow(lambda: self.function(*op.args, **op.kwargs))
        if not self.fused:
            return written
        value = op()
        if not isinstance(value, Tensor) or not isinstance(written, Tensor) or value.shape != written.shape:
            raise NoRule(f"{op.name} has another value")
        return tape.alias(value, written) if tape.depends(written) else value


Statistic = Callable[[Tensor], Tensor]


def _itself(value: Tensor) -> Tensor:
    return value


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    statistic: Statistic = _itself,
) -> Tensor:
    return _affine(_standardized(input, _trailing(input, normalized_shape), eps, statistic), weight, bias)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    statistic: Statistic = _itself,
) -> Tensor:
    eps = torch.finfo(_precise(input).dtype).eps if eps is None else eps
    return _affine(
        _standardized(input, _trailing(input, normalized_shape), eps, statistic, centred=False), weight, None
    )


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    *,
    statistic: Statistic = _itself,
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, input.shape[1:].numel() // num_groups)
    normalized = _standardized(groups, [2], eps, statistic).reshape(input.shape)
    return _affine(normalized, *_by_channel(input, weight, bias))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    *,
    statistic: Statistic = _itself,
) -> Tensor:
    if not use_input_stats:
        if running_mean is None or running_var is None:  # as in torch's own function, which has another order
            raise NoRule("instance_norm without its statistics")
        mean, variance = _by_channel(input, running_mean, running_var)
        return _affine((input - mean) * torch.rsqrt(variance + eps), *_by_channel(input, weight, bias))
    if running_mean is not None:
        raise NoRule("instance_norm that keeps running statistics")
    normalized = _standardized(input, [*range(2, input.ndim)], eps, statistic)
    return _affine(normalized, *_by_channel(input, weight, bias))


def _softmax(input: Tensor, dim: int | None = None, *rest: object, **options: object) -> Tensor:
    return _log_softmax(input, dim, *rest, **options).exp()


def _softmin(input: Tensor, dim: int | None = None, *rest: object, **options: object) -> Tensor:
    return _log_softmax(-input, dim, *rest, **options).exp()


def _log_softmax(input: Tensor, dim: int | None = None, *rest: object, **options: object) -> Tensor:
    """The entries less their log sum exp, both shifted by the largest entry, which keeps the digits of small differences."""
    if dim is None or any(isinstance(option, torch.dtype) for option in (*rest, *options.values())):
        raise NoRule("softmax of no dimension, or to another dtype")
    shifted = input - _precise(input).detach().amax(dim, keepdim=True)
    return shifted - shifted.logsumexp(dim, keepdim=True)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return input / _precise(input).norm(p, dim, keepdim=True).clamp_min(eps)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = mat1 @ mat2
    return torch.add(product if alpha == 1 else alpha * product, input if beta == 1 else beta * input)


def _var_mean(
    input: Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> tuple[Tensor, Tensor]:
    less = int(unbiased) if correction is None else correction
    return input.var(dim, correction=less, keepdim=keepdim), input.mean(dim, keepdim=keepdim)


def _std_mean(
    input: Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> tuple[Tensor, Tensor]:
    less = int(unbiased) if correction is None else correction
    return input.std(dim, correction=less, keepdim=keepdim), input.mean(dim, keepdim=keepdim)


def _standardized(input: Tensor, dims: list[int], eps: float, statistic: Statistic, centred: bool = True) -> Tensor:
    if statistic is _itself:
        return _followed(_precise(input), dims, eps, centred)
    return _by_parts(input, dims, eps, centred, statistic)


def _by_parts(input: Tensor, dims: list[int], eps: float, centred: bool, statistic: Statistic = _itself) -> Tensor:
    value = input - statistic(_precise(input).mean(dims, keepdim=True)) if centred else _precise(input)
    return value * statistic(torch.rsqrt(value.square().mean(dims, keepdim=True) + eps))


def standardize(input: Tensor, dims: list[int], eps: float, centred: bool) -> Tensor:
    """(input - mean) / sqrt(variance + eps) along dimensions, without the mean unless `centred`: an operation for a tape."""
    return _by_parts(input, dims, eps, centred)


_followed = overridable(standardize, standardize)


class Standardization(Rule):
    """The rule of `standardize`."""

    def record(self, tape: Recorder, op: Operation) -> Tensor:
        """Evaluate it, and keep its scale."""
        x, dims, eps, centred = op.args
        statistics: list[Tensor] = []

        def kept(statistic: Tensor) -> Tensor:
            statistics.append(statistic)
            return statistic

        value = _by_parts(x, dims, eps, centred, kept)
        places = tuple(dim % x.ndim for dim in dims)
        return tape.learn(value, Standardized(places, x.shape, value, statistics[-1], centred), [x])


def _precise(input: Tensor) -> Tensor:
    """The argument: torch normalizes lower precision in a higher one, whose result is not had from the parts."""
    if input.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(input.device.type):
        raise NoRule("a normalization in low precision")
    return input


def _trailing(input: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    return [*range(-len(normalized_shape), 0)]


def _by_channel(input: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Parameters of channels, dimension 1, that are broadcast along the others."""
    return [None if p is None else p.view(-1, *[1] * (input.ndim - 2)) for p in parameters]


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


NORMALIZATIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
}
"""Those by statistics of each sample, which their keyword `statistic`, a function of a tensor, may replace."""

WRITTEN: dict[str, Callable[..., Any]] = {
    **NORMALIZATIONS,
    "addmm": _addmm,
    "glu": _glu,
    "softmax": _softmax,
    "softmin": _softmin,
    "log_softmax": _log_softmax,
    "normalize": _normalize,
    "var_mean": _var_mean,
    "std_mean": _std_mean,
}
"""By the name of the operation: the same in simpler ones."""

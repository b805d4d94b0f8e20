"""Parts of a batch: data, context and weights, by place or by key."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from divflow.errors import DivflowError
from divflow.operators.context import Context, check_context

__all__ = ["Batch", "DataError", "Keys", "Parts", "check_keys", "parts_of"]

Batch = Any
"""What a loader gives: data `(k, *event)`, a tuple or list of these and a context, or a dict of them by key."""

Keys = Mapping[str, Any]
"""Where `x`, `context` and `weight` are in a batch: keys of a dict, places in a tuple; a list of keys for a context of several."""


class DataError(DivflowError, ValueError):
    """The data can't be used as they are; the message names the part, and what to do."""


class Parts(NamedTuple):
    """The parts of a batch.

    Attributes:
        x: data `(k, *event)`.
        context: a tensor or a tree of tensors, one row a sample; None for none.
        weight: how much each sample counts, `(k,)`, not negative; None for all alike.
    """

    x: Tensor
    context: Context | None = None
    weight: Tensor | None = None


def parts_of(batch: Batch, keys: Keys | None = None) -> Parts:
    """Split a batch into data, context and weights; what is left out must be left out by `keys`.

    | batch | parts |
    |---|---|
    | `x`, `(x,)`, `[x]` | x |
    | `(x, context)`, `[x, context]` | x and context |
    | dict or named tuple with `x`, `context`, `weight` and nothing else | by these names |
    | anything else | by `keys` |

    Args:
        batch: batch of a loader.
        keys: where the parts are, such as `{"x": "image", "context": "label"}` or `{"x": 0, "weight": 2}`. Parts that they do
            not name are left out. A list or dict of keys makes a context of several parts.

    Returns:
        The parts.

    Raises:
        DataError: the batch is none of these, or its weights are negative, not finite, all zero, or not `(k,)`.
        FieldError: the context is no tensor or tree of tensors with one row a sample.
    """
    if isinstance(batch, Parts):
        return batch
    parts = _by_default(batch) if keys is None else _by_keys(batch, keys)
    if not isinstance(parts.x, Tensor) or parts.x.ndim == 0:
        what = f"a scalar, {parts.x}" if isinstance(parts.x, Tensor) else f"a {type(parts.x).__name__}"
        raise DataError(f"the x of a batch must be a tensor (k, *event), one row a sample, but is {what}")
    check_context(parts.context, parts.x)
    if parts.weight is not None:
        _check_weight(parts.weight, len(parts.x))
    return parts


def check_keys(keys: Keys | None) -> None:
    """Refuse keys that do not name x, or that name parts that do not exist.

    Raises:
        DataError: naming them.
    """
    if keys is None:
        return
    if not isinstance(keys, Mapping) or not set(keys) <= set(Parts._fields) or keys.get("x") is None:
        raise DataError(
            f"keys must name x, and may name context and weight, such as {{'x': 'image', 'context': 'label'}}, but is {keys!r}"
        )


def _by_default(batch: Batch) -> Parts:
    if isinstance(batch, Tensor):
        return Parts(batch)
    named = _named(batch)
    if "x" in named and set(named) <= set(Parts._fields):
        return Parts(**named)
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 2 and "x" not in named:
        return Parts(*batch)
    if isinstance(batch, Mapping) or "x" in named:
        example = {"x": next(iter(named), "image")}
        raise DataError(
            f"a batch has {_listed(named)}. Name x, context and weight among these by keys, such as keys={example}, or by the "
            f"command's data.keys={{x: {example['x']}}}"
        )
    if isinstance(batch, tuple | list):
        raise DataError(
            f"a batch is a {type(batch).__name__} of {len(batch)} parts, but a task knows only (x,) and (x, context) by their places. Name "
            "the parts by keys, such as keys={'x': 0, 'context': 1, 'weight': 2}, or by the command's data.keys={x: 0, weight: 2}"
        )
    raise DataError(
        f"a batch must be a tensor x, (x,), (x, context), or a dict of x, context and weight, but is a {type(batch).__name__}"
    )


def _by_keys(batch: Batch, keys: Keys) -> Parts:
    check_keys(keys)
    named = _named(batch) or (dict(enumerate(batch)) if isinstance(batch, tuple | list) else {})
    places = dict(enumerate(named.values())) if isinstance(batch, tuple) else {}

    def found(part: str, key: Any) -> Any:
        if key not in named and key not in places:
            there = _listed(named) if named else f"no keys, being a {type(batch).__name__}"
            raise DataError(f"keys name {key!r} as {part}, but a batch has {there}")
        return named[key] if key in named else places[key]

    parts: dict[str, Any] = dict.fromkeys(Parts._fields)
    for part, key in keys.items():
        if key is not None:
            parts[part] = {it: found(part, it) for it in key} if _several(key) else found(part, key)
    return Parts(**parts)


def _several(key: Any) -> bool:
    return isinstance(key, Sequence) and not isinstance(key, str)


def _named(batch: Batch) -> dict[Any, Any]:
    """What has names, by these."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return dict(batch._asdict()) if isinstance(batch, tuple) and hasattr(batch, "_asdict") else {}


def _listed(named: Mapping[Any, Any]) -> str:
    return f"the keys {', '.join(map(repr, named))}" if named else "no keys"


def _check_weight(weight: Any, count: int) -> None:
    if not isinstance(weight, Tensor) or weight.shape != (count,) or weight.is_complex() or weight.dtype == torch.bool:
        what = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
        raise DataError(
            f"the weights of a batch must be real numbers of shape ({count},), one a sample, but are {what}"
        )
    values = weight.detach()
    if not count or bool((values.isfinite() & (values >= 0)).all() & (values > 0).any()):  # the host waits once
        return
    if not (values > 0).any() and not values.isnan().any() and not (values < 0).any():
        raise DataError(
            f"the weights of a batch of {count} samples are all zero, so the batch has no mean. Leave such rows out"
        )
    row = int((~(values.isfinite() & (values >= 0))).nonzero()[0])
    raise DataError(
        f"the weights of a batch must be finite and not negative, but that of row {row} of {count}, counted from 0, is "
        f"{values[row].item():g}. Correct it, or give the row the weight 0"
    )

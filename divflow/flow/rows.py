"""Rows of data, as densities and transforms take them: what is refused, and in which rows."""

import torch
from torch import Size, Tensor

from divflow.errors import FieldError, listed_rows

__all__ = ["check_broadcast", "check_finite_rows", "check_range", "checked_rows"]


def checked_rows(x: Tensor, event_shape: Size | tuple[int, ...] | None = None, name: str = "x") -> Tensor:
    """Return x, or refuse it unless it is a floating-point tensor `(k, *event)`; its values are not read.

    Integers are refused, too, because results computed in their dtype would be truncated or overflow.

    Args:
        x: the data.
        event_shape: of one row; any if None.
        name: in messages.

    Raises:
        FieldError: with what was received and the remedy.
    """
    if not isinstance(x, Tensor):
        raise FieldError(
            f"{name} must be a tensor, one row per sample, but is a {type(x).__name__}; use torch.as_tensor({name}, dtype=torch.float64)"
        )
    if x.is_complex():
        raise FieldError(
            f"{name} must be real, but has {x.dtype}; pass real and imaginary parts as entries, torch.view_as_real({name})"
        )
    if not x.is_floating_point():
        raise FieldError(f"{name} must have a floating dtype, but has {x.dtype}; convert it by {name}.double()")
    if x.ndim == 0:
        raise FieldError(f"{name} must have one row per sample, but is a scalar; one sample is {name}.reshape(1, ...)")
    if event_shape is not None and x.shape[1:] != Size(event_shape):
        one = f"; one sample is {name}.unsqueeze(0)" if x.shape == Size(event_shape) else ""
        raise FieldError(
            f"{name} must have shape (k, {', '.join(map(str, event_shape))}), one row per sample, but has {tuple(x.shape)}{one}"
        )
    return x


def check_broadcast(x: Tensor, **tensors: Tensor) -> None:
    """Refuse data to whose events these tensors do not broadcast: one column must not become three.

    Args:
        x: the data.
        **tensors: of a transform, by name.

    Raises:
        FieldError: with both shapes.
    """
    for name, tensor in tensors.items():
        try:
            fits = torch.broadcast_shapes(tensor.shape, x.shape[1:]) == x.shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            shape = tuple(tensor.shape)
            raise FieldError(
                f"the {name} of the data's transform has shape {shape}, so x must have shape (k, {', '.join(map(str, shape))}), one row "
                f"per sample, but has {tuple(x.shape)}"
            )


def check_finite_rows(x: Tensor, name: str = "x", remedy: str = "drop them or fill them in") -> None:
    """Refuse rows with NaN or infinite entries; tensors without readable values, as inside `torch.vmap`, pass.

    Args:
        x: the data.
        name: in the message.
        remedy: in the message.

    Raises:
        FieldError: with the numbers of the first such rows.
    """
    if not (x.is_floating_point() or x.is_complex()) or len(x) == 0:
        return
    bad = _rows(~x.detach().isfinite())
    if _read(bad):
        raise FieldError(f"{name} must be finite, but is not in {listed_rows(bad)}; {remedy}")


def check_range(x: Tensor, low: Tensor | float, high: Tensor | float, slack: float = 0.0) -> None:
    """Refuse rows with an entry that is not strictly between `low - slack` and `high + slack`.

    Args:
        x: the data.
        low: the least value.
        high: the largest value.
        slack: by how much they may be exceeded.

    Raises:
        FieldError: with the range, that of the data, and the numbers of the first such rows.
    """
    if len(x) == 0:
        return
    x = x.detach()
    bad = _rows((x <= low - slack) | (x >= high + slack))
    if _read(bad):
        raise FieldError(
            f"this density takes data from {_described(low, high)}, but these reach from {x.min().item():g} to {x.max().item():g}, beyond that "
            f"in {listed_rows(bad)}. Convert them to its units."
        )


def _described(low: Tensor | float, high: Tensor | float) -> str:
    least = low.min().item() if isinstance(low, Tensor) else low
    most = high.max().item() if isinstance(high, Tensor) else high
    return f"{least:g} to {most:g}"


def _rows(bad: Tensor) -> Tensor:
    return bad.reshape(len(bad), -1).any(dim=1) if bad.ndim > 1 else bad


def _read(bad: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(bad.any())
    except RuntimeError:  # nothing can be read inside torch.vmap
        return False

"""The base class of all transforms of data: checks of the data, and buffers that keep their digits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from divflow.flow.rows import check_finite_rows, checked_rows

__all__ = ["Transform", "at_least_float32"]


class Transform(nn.Module, ABC):
    """An invertible map from data to what a flow models; its tensors are buffers, saved with the flow.

    Buffers of float64 stay float64, whatever dtype the module is converted to: the units of data need more digits than a
    network. A subclass implements `forward`, `inverse` and `config`, for data that were checked.
    """

    def __call__(self, x: Tensor, *, values: bool = True) -> tuple[Tensor, Tensor]:
        """Compute y = T(x) and log |det dT/dx| of data, which are checked.

        Args:
            x: the data `(k, *event)`.
            values: whether to check their values, for which the host waits for another device; type and shape are always
                checked.

        Raises:
            FieldError: data of another type or shape; with `values`, not finite or out of range.
        """
        x = self.checked(checked_rows(x))
        if values:
            self.check_values(x)
        return super().__call__(x)

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute y = T(x), `(k, *event)`, and log |det dT/dx| in nats, `(k,)`; of x's dtype, at least float32."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Compute x = T^-1(y), `(k, *event)`, in float64, whose digits the data's units may need."""

    def unrounded(self, y: Tensor) -> Tensor:
        """Compute T^-1(y) before whole numbers are rounded, where its log-determinant is taken."""
        return self.inverse(y)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return plain values to rebuild it from: `_target_`, the class, and its arguments."""

    @property
    def data_range(self) -> tuple[Tensor, Tensor] | None:
        """Return the least and the largest data allowed, which broadcast to the event; None if all are."""
        return None

    def checked(self, x: Tensor) -> Tensor:
        """Return x, or refuse it if its type or shape is not what this transform takes.

        Raises:
            FieldError: with what was received.
        """
        return checked_rows(x)

    def check_values(self, x: Tensor) -> None:
        """Refuse rows that are not finite or out of range.

        Raises:
            FieldError: with their numbers.
        """
        check_finite_rows(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype to compute in with data of x's.

    Args:
        x: the data.
    """
    return torch.promote_types(x.dtype, torch.float32)

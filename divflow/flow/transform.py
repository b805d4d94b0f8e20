"""What all transforms of data share: a check of what they take, and buffers that keep their digits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from divflow.flow.rows import check_finite_rows, checked_rows

__all__ = ["Transform", "at_least_float32"]


class Transform(nn.Module, ABC):
    """An invertible map from data to what a flow models; its tensors are buffers, saved with the flow.

    Buffers of float64 stay so, whatever dtype the module is brought to: data's units have more digits than a network needs.
    A subclass implements `forward`, `inverse` and `config`, for data that were checked.
    """

    def __call__(self, x: Tensor, *, values: bool = True) -> tuple[Tensor, Tensor]:
        """Y = T(x) and log |det dT/dx| of data x `(k, *event)`, which are checked.

        Args:
            x: the data.
            values: whether their values are read, for which the host waits for another device; type and shape are known without.

        Raises:
            FieldError: data of another type or shape; with `values`, not finite or out of range.
        """
        x = self.checked(checked_rows(x))
        if values:
            self.check_values(x)
        return super().__call__(x)

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Y = T(x), `(k, *event)`, and log |det dT/dx| in nats, `(k,)`; of x's dtype, float32 at least."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """X = T^-1(y), `(k, *event)`, in float64, whose digits the data's units may need."""

    def unrounded(self, y: Tensor) -> Tensor:
        """T^-1(y) where its log-determinant is taken: before the entries of whole numbers are rounded."""
        return self.inverse(y)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values to rebuild it from: `_target_`, the class, and its arguments."""

    @property
    def data_range(self) -> tuple[Tensor, Tensor] | None:
        """The least and the largest data that it takes, which broadcast to the event; None where all are."""
        return None

    def checked(self, x: Tensor) -> Tensor:
        """X, or an error where its type or shape is not what this transform takes.

        Raises:
            FieldError: naming what was received.
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
    """The dtype in which data of x's are computed with."""
    return torch.promote_types(x.dtype, torch.float32)

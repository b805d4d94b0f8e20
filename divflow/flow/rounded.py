"""Whole numbers among the data: modelled with noise, and rounded when they are sampled."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from divflow.flow.rows import check_broadcast
from divflow.flow.transform import Transform, at_least_float32

__all__ = ["Rounded"]


class Rounded(Transform):
    """Keep data as they are, and round the entries of whole numbers in samples.

    The data have noise in [-1/2, 1/2) on these entries. A density p of the noisy numbers is one of whole numbers n by
    P(n) = E p(n + u); p(n), at the middle of the step, is close to it.

    Args:
        entries: which of the event's entries are whole numbers, of its shape.
    """

    entries: Tensor

    def __init__(self, entries: Tensor | Sequence[bool]) -> None:
        super().__init__()
        device = entries.device if isinstance(entries, Tensor) else torch.device("cpu")
        self.register_buffer("entries", torch.as_tensor(entries, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Return the data as they are, and zero."""
        return x.to(at_least_float32(x)), x.new_zeros(len(x), dtype=at_least_float32(x))

    def checked(self, x: Tensor) -> Tensor:
        """Return x, or refuse it unless the entries broadcast to its events."""
        x = super().checked(x)
        check_broadcast(x, entries=self.entries)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, rounded in the entries of whole numbers."""
        x = self.unrounded(y)
        return torch.where(self.entries, x.round(), x)

    def unrounded(self, y: Tensor) -> Tensor:
        """Return y as it is."""
        return self.checked(y).double()

    def config(self) -> dict[str, Any]:
        """Describe the class and the entries."""
        return {"_target_": "divflow.flow.transforms.Rounded", "entries": self.entries.tolist()}

"""An SDE whose signal falls as a cosine."""

import math
from dataclasses import dataclass

from torch import Tensor

from divflow.score import SDE, SDEError

__all__ = ["Cosine"]


@dataclass(frozen=True)
class Cosine(SDE):
    """alpha(t) = cos(angle t / T), sigma(t) = sin(angle t / T).

    Args:
        angle: at T, in (0, pi / 2); cos(angle) of the data is left there.
    """

    angle: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.angle < math.pi / 2:
            raise SDEError(f"angle must lie in (0, pi / 2), but is {self.angle}")

    def mean_scale(self, t: Tensor) -> Tensor:
        """The cosine, of t's shape."""
        return (self.angle * t / self.T).cos()

    def std(self, t: Tensor) -> Tensor:
        """The sine, of t's shape."""
        return (self.angle * t / self.T).sin()

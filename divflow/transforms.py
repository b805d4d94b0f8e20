"""Invertible preprocessing with its log-determinant, so that densities are those of the data themselves."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Affine", "Compose", "Logit", "MeanFreeScale", "Transform"]


class Transform(nn.Module, ABC):
    """An invertible map from data to what a flow models; its tensors are buffers, saved with the flow."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Y = T(x), `(k, *event)`, and log |det dT/dx| in nats, `(k,)`."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """X = T^-1(y), `(k, *event)`."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values to rebuild it from: `_target_`, the class, and its arguments."""


class Affine(Transform):
    """y = (x - shift) / scale, elementwise; shift and scale broadcast to the event.

    Standardization, with the mean and standard deviation of the training data. Both are kept in float64, since
    columns such as dates differ from their mean in digits that float32 does not have.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor | list | float = 0.0, scale: Tensor | list | float = 1.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """The standardized data and -sum log |scale|."""
        log_scale = self.scale.abs().log().expand(x.shape[1:]).sum()
        return ((x - self.shift) / self.scale).to(x.dtype), -log_scale.to(x.dtype).expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        """X = y * scale + shift."""
        return (y * self.scale + self.shift).to(y.dtype)

    def config(self) -> dict[str, Any]:
        """The class, shift and scale."""
        return {
            "_target_": "divflow.transforms.Affine",
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
        }


class Logit(Transform):
    """y = logit(margin + (1 - 2 margin) x) from the unit cube, elementwise (Dinh et al. 2017).

    Args:
        margin: keeps the ends of the interval finite, in (0, 1/2).
    """

    def __init__(self, margin: float = 0.05) -> None:
        super().__init__()
        if not 0 < margin < 0.5:
            raise ValueError(f"margin must lie in (0, 1/2), but is {margin!r}")
        self.margin = margin

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """The logits and sum log((1 - 2 margin) / (s (1 - s))) over the event, s = margin + (1 - 2 margin) x."""
        s = self.margin + (1 - 2 * self.margin) * x
        log_s, log_not_s = s.log(), torch.log1p(-s)
        log_slope = math.log(1 - 2 * self.margin) - log_s - log_not_s
        return log_s - log_not_s, log_slope.flatten(1).sum(dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """X = (sigmoid(y) - margin) / (1 - 2 margin)."""
        return (y.sigmoid() - self.margin) / (1 - 2 * self.margin)

    def config(self) -> dict[str, Any]:
        """The class and the margin."""
        return {"_target_": "divflow.transforms.Logit", "margin": self.margin}


class MeanFreeScale(Transform):
    """y = x / scale of particles `(n, d)` whose centre of mass is zero and stays there, for flows whose base is `MeanFreeNormal`.

    Its log-determinant is that on the subspace of (n - 1) d dimensions, on which the density is one.

    Args:
        scale: one for all entries, positive.
    """

    scale: Tensor

    def __init__(self, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        if self.scale.ndim or not 0 < self.scale < math.inf:
            raise ValueError(
                f"scale must be one positive number, so that the centre of mass stays at zero, but is {scale!r}"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """The scaled particles and -(n - 1) d log(scale)."""
        particles, dimensions = x.shape[1:]
        log_det = -(particles - 1) * dimensions * self.scale.log()
        return (x / self.scale).to(x.dtype), log_det.to(x.dtype).expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        """X = y * scale."""
        return (y * self.scale).to(y.dtype)

    def config(self) -> dict[str, Any]:
        """The class and the scale."""
        return {"_target_": "divflow.transforms.MeanFreeScale", "scale": self.scale.item()}


class Compose(Transform):
    """Several transforms, applied from the first to the last."""

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        self.parts = cast(Sequence[Transform], nn.ModuleList(parts))

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """The last transform's output and the sum of all log-determinants."""
        total = x.new_zeros(x.shape[0])
        for part in self.parts:
            x, log_det = part(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        """The inverses, from the last to the first."""
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y

    def config(self) -> dict[str, Any]:
        """The class and the parts."""
        return {"_target_": "divflow.transforms.Compose", "parts": [part.config() for part in self.parts]}

"""Invertible preprocessing with its log-determinant, so that densities are those of the data themselves."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import FieldError, checked_range
from divflow.flow.rounded import Rounded
from divflow.flow.rows import check_broadcast, check_range
from divflow.flow.transform import Transform, at_least_float32

__all__ = ["Affine", "Bounded", "Compose", "Logit", "MeanFreeScale", "Rounded", "Transform"]


class Affine(Transform):
    """Standardize data elementwise: y = (x - shift) / scale.

        log |det dy/dx| = -sum log |scale|

    Usually these are the mean and standard deviation of the training data. Both are kept in float64, because columns such
    as dates differ from their mean in digits that float32 lacks.

    Args:
        shift: subtracted; it broadcasts to the event.
        scale: divides; it broadcasts to the event.

    Raises:
        ValueError: a shift or scale that is not finite, or a scale of zero.

    Example:
        >>> y, log_det = Affine(shift=10.0, scale=2.0)(torch.tensor([[12.0]]))
        >>> y, log_det
        (tensor([[1.]]), tensor([-0.6931]))
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor | list | float = 0.0, scale: Tensor | list | float = 1.0) -> None:
        super().__init__()
        device = _device_for(shift, scale)
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64, device=device))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64, device=device))
        if self.shift.is_meta or self.scale.is_meta:  # nothing to read
            return
        if not (self.shift.isfinite().all() and (self.scale.isfinite() & (self.scale != 0)).all()):
            raise ValueError(
                f"shift and scale must be finite, and scale must not be zero, but they are {_shown(self.shift)} and {_shown(self.scale)}"
            )

    @classmethod
    def between(cls, data: Sequence[float | int], model: Sequence[float | int]) -> "Affine":
        """Map one range to another: data from 0 to 1 for a model of -1 to 1 take `Affine.between((0, 1), (-1, 1))`.

        Args:
            data: the range of the data, low and high.
            model: that of the model.

        Raises:
            ValueError: a value that is not such a range.
        """
        (low, high), (start, end) = checked_range("data", data), checked_range("model", model)
        scale = (high - low) / (end - start)
        return cls(low - start * scale, scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Return the standardized data and -sum log |scale|."""
        log_scale = self.scale.abs().log().expand(x.shape[1:]).sum()
        dtype = at_least_float32(x)
        return ((x.double() - self.shift) / self.scale).to(dtype), -log_scale.to(dtype).expand(x.shape[0])

    def checked(self, x: Tensor) -> Tensor:
        """Return x, or refuse it unless shift and scale broadcast to its events."""
        x = super().checked(x)
        check_broadcast(x, shift=self.shift, scale=self.scale)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Return x = y * scale + shift."""
        return self.checked(y).double() * self.scale + self.shift

    def config(self) -> dict[str, Any]:
        """Describe the class, shift and scale."""
        return {
            "_target_": "divflow.flow.transforms.Affine",
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
        }


class Logit(Transform):
    """Map the unit cube to all numbers elementwise: y = logit(margin + (1 - 2 margin) x) (Dinh et al. 2017).

    Args:
        margin: keeps the ends of the interval finite, in (0, 1/2).

    Raises:
        ValueError: a margin outside (0, 1/2).
    """

    def __init__(self, margin: float = 0.05) -> None:
        super().__init__()
        if not 0 < margin < 0.5:
            raise ValueError(f"margin must lie in (0, 1/2), but is {margin!r}")
        self.margin = margin

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Return the logits and sum log((1 - 2 margin) / (s (1 - s))) over the event, s = margin + (1 - 2 margin) x."""
        s = self.margin + (1 - 2 * self.margin) * x.to(at_least_float32(x))
        log_s, log_not_s = s.log(), torch.log1p(-s)
        log_slope = math.log(1 - 2 * self.margin) - log_s - log_not_s
        return log_s - log_not_s, log_slope.flatten(1).sum(dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x = (sigmoid(y) - margin) / (1 - 2 margin)."""
        return (self.checked(y).double().sigmoid() - self.margin) / (1 - 2 * self.margin)

    @property
    def data_range(self) -> tuple[Tensor, Tensor]:
        """Return zero and one."""
        return torch.zeros((), device="cpu"), torch.ones((), device="cpu")

    def check_values(self, x: Tensor) -> None:
        """Refuse rows that are not finite, or so far outside of the unit cube that they have no logit."""
        super().check_values(x)
        check_range(x, 0.0, 1.0, slack=self.margin / (1 - 2 * self.margin))

    def config(self) -> dict[str, Any]:
        """Describe the class and the margin."""
        return {"_target_": "divflow.flow.transforms.Logit", "margin": self.margin}


class Bounded(Transform):
    """Map bounded data to all numbers elementwise: y = log(x - low) - log(high - x).

    With one bound y is its term alone; without any, y = x. Densities that end at known bounds, such as a uniform prior's,
    become smooth on the whole line, and samples stay within the bounds (the unconstraining transforms of Carpenter et al.
    2017, Stan). Data at a bound or beyond have density zero: their log-determinant is -inf.

    Args:
        low: lower bounds, broadcast to the event; -inf, or None in a list, for no bound.
        high: upper bounds, of the same shape; inf, or None in a list, for no bound.

    Raises:
        ValueError: a bound that is NaN, or low not below high.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, low: Tensor | Sequence[float | None] | float, high: Tensor | Sequence[float | None] | float
    ) -> None:
        super().__init__()
        self.register_buffer("low", _bound(low, -math.inf))
        self.register_buffer("high", _bound(high, math.inf))
        if not (self.low < self.high).all():
            raise ValueError(f"each low must lie below its high, but they are {low!r} and {high!r}")

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Return the unbounded data, and sum log dy/dx over the event."""
        x = x.to(at_least_float32(x))
        has_low, has_high = self.low.isfinite(), self.high.isfinite()
        outside = (x <= self.low) | (x >= self.high)
        inside = torch.where(outside, self._within(), x)
        above = torch.where(has_low, inside - self.low, 1.0).log()
        below = torch.where(has_high, self.high - inside, 1.0).log()
        y = torch.where(has_low | has_high, above - below, inside)
        width = torch.where(has_low & has_high, self.high - self.low, 1.0).log()
        log_slope = torch.where(outside, -math.inf, width - above - below)
        return y.to(x.dtype), log_slope.flatten(1).sum(dim=1).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, kept within the bounds in spite of rounding."""
        has_low, has_high = self.low.isfinite(), self.high.isfinite()
        both, one, y = has_low & has_high, has_low ^ has_high, self.checked(y).double()
        between = torch.where(both, self.low, 0.0) + torch.where(both, self.high - self.low, 0.0) * y.sigmoid()
        sign = torch.where(has_low, 1.0, -1.0)
        beside = torch.where(has_low, self.low, self.high) + sign * (sign * torch.where(one, y, 0.0)).exp()
        x = torch.where(both, between, torch.where(one, beside, y))
        least = torch.where(has_low, self.low.nextafter(self.high), self.low)
        return x.clamp(least, torch.where(has_high, self.high.nextafter(self.low), self.high))

    def checked(self, x: Tensor) -> Tensor:
        """Return x, or refuse it unless the bounds broadcast to its events."""
        x = super().checked(x)
        check_broadcast(x, low=self.low, high=self.high)
        return x

    @property
    def data_range(self) -> tuple[Tensor, Tensor]:
        """Return the bounds; beyond them the density is zero."""
        return self.low, self.high

    def config(self) -> dict[str, Any]:
        """Describe the class and the bounds, None for no bound."""
        bounds = {name: _plain(getattr(self, name).tolist()) for name in ("low", "high")}
        return {"_target_": "divflow.flow.transforms.Bounded", **bounds}

    def _within(self) -> Tensor:
        """A point of each interval."""
        low, high = self.low, self.high
        middle = torch.where(high.isfinite(), (low + high) / 2, low + 1)
        return torch.where(low.isfinite(), middle, torch.where(high.isfinite(), high - 1, 0.0))


class MeanFreeScale(Transform):
    """Scale particles whose centre of mass is and stays zero: y = x / scale.

    It is for flows whose base is `MeanFreeNormal`. Its log-determinant is that on the subspace of (n - 1) d dimensions, on
    which the density is one: -(n - 1) d log(scale).

    Args:
        scale: one for all entries, positive.

    Raises:
        ValueError: a scale that is not one positive number.
    """

    scale: Tensor

    def __init__(self, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64, device=_device_for(scale)))
        if self.scale.ndim or not 0 < self.scale < math.inf:
            raise ValueError(
                f"scale must be one positive number, so that the centre of mass stays at zero, but is {scale!r}"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Return the scaled particles and -(n - 1) d log(scale)."""
        particles, dimensions = x.shape[1:]
        dtype, log_det = at_least_float32(x), -(particles - 1) * dimensions * self.scale.log()
        return (x.double() / self.scale).to(dtype), log_det.to(dtype).expand(x.shape[0])

    def checked(self, x: Tensor) -> Tensor:
        """Return x, or refuse it unless its events are particles `(n, d)`."""
        x = super().checked(x)
        if x.ndim != 3:
            raise FieldError(f"x must be particles (k, n, d), but has shape {tuple(x.shape)}")
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Return x = y * scale."""
        return self.checked(y).double() * self.scale

    def config(self) -> dict[str, Any]:
        """Describe the class and the scale."""
        return {"_target_": "divflow.flow.transforms.MeanFreeScale", "scale": self.scale.item()}


class Compose(Transform):
    """Apply several transforms, from the first to the last.

    Args:
        parts: the transforms.
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        self.parts = cast(Sequence[Transform], nn.ModuleList(parts))

    def forward(self, x: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Return the last transform's output and the sum of all log-determinants."""
        total = x.new_zeros(x.shape[0], dtype=at_least_float32(x))
        for part in self.parts:
            x, log_det = part(x, values=False)
            total = total + log_det
        return x, total

    @property
    def data_range(self) -> tuple[Tensor, Tensor] | None:
        """Return the range of the first part that has one, if the parts before it are affine."""
        before: list[Affine] = []
        for part in self.parts:
            if (ends := part.data_range) is not None:
                low, high = ends
                for earlier in reversed(before):
                    low, high = (end * earlier.scale + earlier.shift for end in (low, high))
                return torch.minimum(low, high), torch.maximum(low, high)
            if isinstance(part, Rounded):  # it leaves its data unchanged
                continue
            if not isinstance(part, Affine):
                return None
            before.append(part)
        return None

    def check_values(self, x: Tensor) -> None:
        """Refuse rows that are not finite, or out of the range of a part."""
        for part in self.parts:
            part.check_values(x)
            x, _ = part(x, values=False)

    def inverse(self, y: Tensor) -> Tensor:
        """Apply the inverses, from the last to the first."""
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y

    def unrounded(self, y: Tensor) -> Tensor:
        """Apply the inverses without rounding."""
        for part in reversed(self.parts):
            y = part.unrounded(y)
        return y

    def config(self) -> dict[str, Any]:
        """Describe the class and the parts."""
        return {"_target_": "divflow.flow.transforms.Compose", "parts": [part.config() for part in self.parts]}


def _device_for(*given: object) -> torch.device | None:
    """The device of the tensors among some values; numbers, which mix with tensors on all devices, are on the CPU."""
    tensors = [value.device for value in given if isinstance(value, Tensor)]
    if tensors:
        return tensors[0]
    return None if any(hasattr(value, "__len__") for value in given) else torch.device("cpu")


def _bound(bound: Tensor | Sequence | float, none: float) -> Tensor:
    """Bounds as float64, None as `none`."""

    def filled(bound: Any) -> Any:
        if isinstance(bound, Sequence):
            return [filled(entry) for entry in bound]
        return none if bound is None else bound

    return torch.as_tensor(filled(bound), dtype=torch.float64, device=_device_for(bound))


def _plain(bound: Any) -> Any:
    """Bounds as plain values, because not every format has infinities."""
    if isinstance(bound, list):
        return [_plain(entry) for entry in bound]
    return bound if math.isfinite(bound) else None


def _shown(values: Tensor) -> str:
    """The least and the largest of several numbers, or the only one."""
    return f"{values.item():g}" if values.numel() == 1 else f"{values.min().item():g} to {values.max().item():g}"

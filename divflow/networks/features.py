"""Features of points: waves by which a network resolves sharp densities, and is periodic in angles."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.errors import check_count, check_positive, checked_event_shape
from divflow.manifolds import Manifold, Product, Torus
from divflow.networks.conditioning import NetworkError

__all__ = ["FourierFeatures", "ManifoldFeatures", "PeriodicFeatures", "columns", "point_features"]


class PeriodicFeatures(nn.Module):
    """See angles by waves of whole multiples, so that a network is smooth across the end of a period.

        [sin(2 pi h x_i / period), cos(2 pi h x_i / period)],   h = 1, ..., harmonics

    Args:
        event_shape: of the angles, without the batch; an int for vectors.
        harmonics: number of multiples. More resolve sharper densities.
        period: of each angle: 2 pi for radians, 360 for degrees.

    Shape:
        x `(k, *event)`; returns `(k, features)`, features = 2 harmonics times the number of angles.

    Raises:
        ValueError: harmonics are no whole number of at least 1, or the period is not positive.
        NetworkError: in a call, x has another shape.

    Example:
        >>> PeriodicFeatures(1, period=360.0)(torch.tensor([[90.0], [450.0]])).round(decimals=3).abs()
        tensor([[1., 0., 1., 0., 0., 1., 0., 1.],
                [1., 0., 1., 0., 0., 1., 0., 1.]])
    """

    def __init__(self, event_shape: int | Sequence[int], harmonics: int = 4, period: float = 2 * math.pi) -> None:
        super().__init__()
        check_count("harmonics", harmonics)
        check_positive("period", period)
        self.event_shape, self.harmonics, self.period = checked_event_shape(event_shape), harmonics, float(period)
        self.features = 2 * harmonics * math.prod(self.event_shape)

    def forward(self, x: Tensor) -> Float[Tensor, "batch features"]:
        """Features of each point; see the class."""
        x = columns(x, self.event_shape)
        # Computed at each call, multiples are exact in every dtype, whatever the module was converted to.
        multiples = torch.arange(1, self.harmonics + 1, dtype=x.dtype, device=x.device) * (2 * math.pi / self.period)
        angles = (x[:, :, None] * multiples).flatten(1)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.event_shape}, harmonics={self.harmonics}, period={self.period:.6g}"


class FourierFeatures(nn.Module):
    """See points by their coordinates and by random waves of all scales, so that a network learns sharp densities.

        [x, sin(w_1 . x), ..., sin(w_m . x), cos(w_1 . x), ..., cos(w_m . x)]

    (Tancik et al. 2020, arXiv:2006.10739.) The directions of w_i are random. Their norms are in geometric progression from 1 to
    `max_frequency`. They are drawn from torch's generator when the module is built, saved with the network, and not trained.

    A wave of frequency f resolves what is about 1 / f wide. High frequencies cost evaluations, because the solver must resolve them, and
    overfit few data.

    Args:
        event_shape: shape of one point, without the batch; an int for vectors.
        waves: m; 0 leaves the coordinates.
        max_frequency: norm of the last w, in radians per unit of x.

    Shape:
        x `(k, *event)`; returns `(k, features)`, features = size + 2 m.

    Raises:
        ValueError: waves are no whole number of at least 0, or the frequency is not a finite number of at least 1.
        NetworkError: in a call, x has another shape.

    Example:
        >>> FourierFeatures(3, waves=32)(torch.randn(5, 3)).shape
        torch.Size([5, 67])
    """

    frequencies: Tensor

    def __init__(self, event_shape: int | Sequence[int], waves: int = 64, max_frequency: float = 20.0) -> None:
        super().__init__()
        check_count("waves", waves, least=0)
        check_positive("max_frequency", max_frequency)
        if max_frequency < 1:
            raise ValueError(f"max_frequency must be at least 1, that of the slowest wave, but is {max_frequency!r}")
        self.event_shape, self.max_frequency = checked_event_shape(event_shape), float(max_frequency)
        size = math.prod(self.event_shape)
        directions = nn.functional.normalize(torch.randn(waves, size), dim=1)
        scales = self.max_frequency ** torch.linspace(0, 1, waves)
        self.register_buffer("frequencies", scales[:, None] * directions)
        self.features = size + 2 * waves

    def forward(self, x: Tensor) -> Float[Tensor, "batch features"]:
        """Features of each point; see the class."""
        x = columns(x, self.event_shape)
        angles = nn.functional.linear(x, self.frequencies.to(x.dtype))
        return torch.cat([x, angles.sin(), angles.cos()], dim=1)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.event_shape}, waves={len(self.frequencies)}, max_frequency={self.max_frequency:g}"


class ManifoldFeatures(nn.Module):
    """See points of a manifold by features that suit it.

    - Angles of a `Torus` have `PeriodicFeatures`.
    - Points of other manifolds have `FourierFeatures` of their ambient coordinates, rotations of their nine entries.
    - A `Product` has those of its parts, one after another.

    Args:
        manifold: of the points, such as `Sphere(2)`.
        waves: of each part with `FourierFeatures`; 0 leaves the coordinates.
        max_frequency: of these waves.
        harmonics: of each angle.

    Shape:
        x `(k, *event)`; returns `(k, features)`.

    Raises:
        ValueError: as the features of the parts do.
        NetworkError: in a call, x has another shape.

    Example:
        >>> from divflow.manifolds import Sphere
        >>> ManifoldFeatures(Product(way=Sphere(2), angle=Torus(1)), waves=16).features
        43
    """

    def __init__(self, manifold: Manifold, waves: int = 64, max_frequency: float = 20.0, harmonics: int = 4) -> None:
        super().__init__()
        self.product = manifold if isinstance(manifold, Product) else None
        parts = manifold.parts.values() if isinstance(manifold, Product) else [manifold]
        self.parts = nn.ModuleList()
        for part in parts:
            if isinstance(part, Product):
                self.parts.append(ManifoldFeatures(part, waves, max_frequency, harmonics))
            elif isinstance(part, Torus):
                self.parts.append(PeriodicFeatures(part.dim, harmonics, part.period))
            else:
                self.parts.append(FourierFeatures(part.event_shape, waves, max_frequency))
        self.event_shape = tuple(manifold.event_shape)
        self.features: int = sum(point_features(part, 0) for part in self.parts)

    def forward(self, x: Tensor) -> Float[Tensor, "batch features"]:
        """Features of each point; see the class."""
        x = columns(x, self.event_shape).view_as(x)
        points = [x] if self.product is None else self.product.split(x).values()
        return torch.cat([part(point) for part, point in zip(self.parts, points, strict=True)], dim=1)


def point_features(features: nn.Module | None, size: int) -> int:
    """Number of columns of a point: its `size` entries, or those of its features.

    Args:
        features: a module from points `(k, *event)` to `(k, features)`, or None.
        size: of the event.

    Raises:
        NetworkError: the module has no integer attribute `features`.
    """
    count = size if features is None else getattr(features, "features", None)
    if not isinstance(count, int):
        raise NetworkError(
            f"features must be a module with an integer attribute `features`, but {type(features).__name__} has none. Set it, or use "
            "FourierFeatures or PeriodicFeatures"
        )
    return count


def columns(
    x: Tensor, event_shape: tuple[int, ...], features: nn.Module | None = None
) -> Float[Tensor, "batch columns"]:
    """The flattened events, or their features, one row a sample.

    Args:
        x: `(k, *event)`.
        event_shape: that the network was built for.
        features: as of `point_features`.

    Raises:
        NetworkError: x has another shape.
    """
    if tuple(x.shape[1:]) != event_shape:
        raise NetworkError(
            f"the network was built for x of shape (k, *{event_shape}), but x has shape {tuple(x.shape)}"
        )
    if features is None:
        return x.reshape(len(x), math.prod(event_shape))
    return features(x)

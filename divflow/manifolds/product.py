"""Products of manifolds: several parts in one vector, by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from divflow.errors import listed_rows
from divflow.manifolds.manifold import Manifold, ManifoldError

__all__ = ["Product"]


class Product(Manifold):
    """Points with parts on several manifolds, as one vector: the parts one after another, a rotation as its nine entries.

    Args:
        parts: manifolds by name.

    Raises:
        ManifoldError: no part, or one that is not a manifold.

    Example:
        >>> from divflow.manifolds import Euclidean, SpecialOrthogonal
        >>> pose = Product(orientation=SpecialOrthogonal(), position=Euclidean(3))
        >>> pose.event_shape, pose.dim
        (torch.Size([12]), 6)
        >>> x = pose.join({"orientation": torch.eye(3), "position": torch.zeros(3)})
        >>> pose.split(x)["position"]
        tensor([0., 0., 0.])
    """

    def __init__(self, **parts: Manifold) -> None:
        if not parts or not all(isinstance(part, Manifold) for part in parts.values()):
            raise ManifoldError(
                f"a Product has manifolds by name, such as Product(direction=Sphere(2), angle=Torus(1)), but got {parts}"
            )
        self.parts = parts
        self._sizes = [part.event_shape.numel() for part in parts.values()]
        self.event_shape, self.dim = Size([sum(self._sizes)]), sum(part.dim for part in parts.values())

    def __repr__(self) -> str:
        return f"Product({', '.join(f'{name}={part}' for name, part in self.parts.items())})"

    def config(self) -> dict[str, Any]:
        """The class, and each part's own by its name."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"_target_": name, **{name: part.config() for name, part in self.parts.items()}}

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of points or vectors `(*batch, n)`, by name and each of its own shape."""
        pieces = x.split(self._sizes, dim=-1)
        return {
            name: piece.reshape(*x.shape[:-1], *part.event_shape)
            for (name, part), piece in zip(self.parts.items(), pieces, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One vector `(*batch, n)` of all parts by name.

        Raises:
            ManifoldError: other names.
        """
        if parts.keys() != self.parts.keys():
            raise ManifoldError(f"the parts are {sorted(self.parts)}, but got {sorted(parts)}")
        return torch.cat(
            [parts[name].flatten(parts[name].ndim - len(part.event_shape)) for name, part in self.parts.items()], dim=-1
        )

    def project(self, x: Tensor) -> Tensor:
        """Part by part."""
        return self._joined(lambda part, x: part.project(x), x)

    def to_tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """Part by part."""
        return self._joined(lambda part, x, u: part.to_tangent(x, u), x, u)

    @property
    def flat(self) -> bool:
        """Whether all parts are."""
        return all(part.flat for part in self.parts.values())

    def mean_curvature(self, x: Tensor) -> Tensor | None:
        """Part by part; None if that of one is unknown."""
        curvatures = {name: self.parts[name].mean_curvature(part) for name, part in self.split(x).items()}
        known = {name: curvature for name, curvature in curvatures.items() if curvature is not None}
        return self.join(known) if len(known) == len(self.parts) else None

    def normals(self, x: Tensor) -> Tensor | None:
        """Those of all parts; None if those of one are unknown."""
        split, found = self.split(x), []
        for name, part in self.parts.items():
            normals = part.normals(split[name])
            if normals is None:
                return None
            found += [
                self.join({other: torch.zeros_like(split[other]) for other in self.parts} | {name: n}) for n in normals
            ]
        return torch.stack(found) if found else x.new_zeros(0, *x.shape)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """Part by part."""
        return self._joined(lambda part, x, u: part.exp(x, u), x, u)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Part by part."""
        return self._joined(lambda part, x, y: part.log(x, y), x, y)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The root of the sum of the parts' squared distances."""
        distances = [part.distance(a, b) for part, a, b in self._zipped(x, y)]
        return torch.linalg.vector_norm(torch.stack(distances, dim=-1), dim=-1)

    def geodesic(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Part by part, all of which arrive at t = 1."""
        ways = [part.geodesic(a, b, t) for part, a, b in self._zipped(x, y)]
        point, velocity = (self.join(dict(zip(self.parts, each, strict=True))) for each in zip(*ways, strict=True))
        return point, velocity

    def scale(self, like: Tensor) -> Tensor:
        """Part by part."""
        return torch.cat(
            [(like.new_ones(part.event_shape) * part.scale(like)).flatten() for part in self.parts.values()]
        )

    @property
    def volume(self) -> float:
        """The product of the parts' volumes."""
        return math.prod(part.volume for part in self.parts.values())

    def off(self, x: Tensor) -> Tensor:
        """The largest of the parts."""
        return torch.stack([part.off(a) for part, a in self._zipped(x)]).amax(dim=0)

    def uniform(self, dtype: torch.dtype | None = None) -> Distribution:
        """Independent uniform parts; refused where a part's volume is infinite."""
        return Joint(self, {name: part.uniform(dtype) for name, part in self.parts.items()})

    def base(self, dtype: torch.dtype | None = None) -> Distribution:
        """Independent bases of the parts, uniform but for Euclidean ones, which are standard normal."""
        return Joint(self, {name: part.base(dtype) for name, part in self.parts.items()})

    def again(self, x: Tensor) -> Tensor | None:
        """Other coordinates of the parts that have some; None if none has."""
        split = self.split(x)
        others = {name: part.again(split[name]) for name, part in self.parts.items()}
        known = {name: other for name, other in others.items() if other is not None}
        return self.join(split | known) if known else None

    def wrapped_normal(self, mean: Tensor, std: Tensor | float | Mapping[str, Tensor | float]) -> Distribution:
        """Independent wrapped normal parts, each of its own std where these are given by name."""
        means = self.split(mean)
        stds = std if isinstance(std, Mapping) else dict.fromkeys(self.parts, std)
        if stds.keys() != self.parts.keys():
            raise ManifoldError(
                f"std must be one number, or one for each of the parts {sorted(self.parts)}, but has {sorted(stds)}"
            )
        return Joint(self, {name: part.wrapped_normal(means[name], stds[name]) for name, part in self.parts.items()})

    def _zipped(self, *points: Tensor) -> list[tuple]:
        split = [self.split(x) for x in points]
        return [(part, *(x[name] for x in split)) for name, part in self.parts.items()]

    def _joined(self, function: Callable[..., Tensor], *points: Tensor) -> Tensor:
        parts = self._zipped(*points)
        return self.join({name: function(*part) for name, part in zip(self.parts, parts, strict=True)})

    def _check_finite(self, rows: Tensor, tolerance: float) -> None:
        for name, part in self.parts.items():
            off = part.off(self.split(rows)[name])
            if (bad := ~(off <= tolerance)).any():
                furthest = off[bad].nan_to_num(torch.inf).max().item()
                raise ManifoldError(
                    f"the part {name!r} is off {part} by up to {furthest:.3g} in {listed_rows(bad)}; check its units and the order of the "
                    "parts, and use manifold.project(x) if the closest points are meant"
                )


class Joint(Distribution):
    """Independent densities of the parts of a product, over its vectors."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, product: Product, parts: dict[str, Distribution]) -> None:
        self.manifold, self.parts = product, parts
        batch = next(iter(parts.values())).batch_shape
        super().__init__(batch, product.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The ambient space, of which `log_prob` refuses all but the manifold."""
        return constraints.independent(constraints.real, 1)

    def expand(self, batch_shape: Sequence[int], _instance: "Joint | None" = None) -> "Joint":
        """The same, with a batch shape."""
        return Joint(self.manifold, {name: part.expand(Size(batch_shape)) for name, part in self.parts.items()})

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Points `(*sample_shape, *batch, n)`, differentiable in the parts' parameters."""
        return self.manifold.join({name: part.rsample(Size(sample_shape)) for name, part in self.parts.items()})

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum of the parts' log-densities in nats."""
        self.manifold.check(value)
        parts = self.manifold.split(value)
        return torch.stack([part.log_prob(parts[name]) for name, part in self.parts.items()]).sum(dim=0)

"""Manifolds without curvature: Euclidean spaces and tori."""

import torch
from torch import Tensor

from divflow.manifolds.manifold import Manifold

__all__ = ["Flat"]


class Flat(Manifold):
    """A manifold of which every vector is tangent at every point, so that divergences are the ordinary ones."""

    @property
    def flat(self) -> bool:
        """True: every vector is tangent."""
        return True

    def to_tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """The vector itself."""
        return u

    def mean_curvature(self, x: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(x)

    def normals(self, x: Tensor) -> Tensor:
        """None of them, `(0, *batch, n)`."""
        return x.new_zeros(0, *x.shape)

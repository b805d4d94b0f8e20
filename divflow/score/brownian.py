"""Brownian motion on manifolds, which carries data to uniform noise."""

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from divflow.distributions.noise import normal_like
from divflow.errors import check_count
from divflow.manifolds import Manifold
from divflow.manifolds.manifold import check_manifold
from divflow.score.prior import SDEError
from divflow.score.sde import VarianceExploding, broadcast

__all__ = ["BrownianMotion"]


@dataclass(frozen=True)
class BrownianMotion(VarianceExploding):
    """Let data diffuse on a manifold until they are uniform (De Bortoli et al. 2022, arXiv:2202.02763).

        dx = g(t) dB,   sigma(t)^2 = integral of g^2 = sigma_min^2 (r^(2 t / T) - 1),   r = sigma_max / sigma_min

    where B is the Brownian motion of the manifold's metric. The score is the gradient of log p_t in that metric, a tangent field.

    - On tori x_t is drawn exactly, by the wrapped normal density, whose score is known: all objectives train there.
    - On other manifolds it is drawn by a geodesic random walk of `steps` steps, x <- exp_x(sigma n / sqrt(steps)). Implicit and sliced objectives
      train there; denoising needs a score that is not known.
    - The error of the walk is of order sigma^4 / steps: on the sphere the mean of x_t is off by at most 0.09 / steps.

    Args:
        event_shape: that of the manifold's points; taken from it if None.
        T: as of `SDE`.
        epsilon: as of `SDE`.
        sigma_min: as of `VarianceExploding`, in the manifold's units: radians on spheres, rotations and angles of period 2 pi.
        sigma_max: so large that the data are uniform at T. At 3 radians a hundredth of their first harmonic is left on tori of period 2 pi, and a
            ten thousandth on the sphere and the rotations.
        manifold: of finite volume, such as `Sphere(2)`.
        steps: of the random walk.

    Raises:
        ManifoldError: no manifold.
        SDEError: a manifold of infinite volume, or an event shape that is not its own; as `VarianceExploding`.
        ValueError: fewer than one step.

    Example:
        >>> from divflow.manifolds import Sphere
        >>> sde = BrownianMotion(manifold=Sphere(2))
        >>> north = torch.tensor([[0.0, 0.0, 1.0]]).expand(1000, 3)
        >>> sde.diffuse(north, torch.tensor(1.0))[0].mean(dim=0).norm() < 0.1  # uniform
        tensor(True)
    """

    sigma_max: float = 3.0
    manifold: Manifold = field(kw_only=True)
    steps: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        shape = tuple(self.manifold.event_shape)
        object.__setattr__(self, "event_shape", shape if self.event_shape is None else self.event_shape)
        super().__post_init__()
        if self.event_shape != shape:
            raise SDEError(
                f"points of {self.manifold} have shape {shape}, but event_shape={self.event_shape}. Leave it out"
            )
        check_count("steps", self.steps)
        if not math.isfinite(self.manifold.volume):
            raise SDEError(
                f"data that diffuse on {self.manifold} never become uniform, since its volume is infinite. Use VariancePreserving() in "
                "Euclidean space, or flow matching with GeodesicPath"
            )

    @property
    def prior(self) -> Distribution:
        """The uniform density of the manifold."""
        return self.manifold.uniform()

    def noise(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw standard normal tangent vectors at x."""
        return self.manifold.to_tangent(x, normal_like(x, generator)) / self.manifold.scale(x)

    def moved(self, x: Tensor, vector: Tensor) -> Tensor:
        """Follow the geodesic from x along the tangent part of a vector."""
        return self.manifold.exp(x, self.manifold.to_tangent(x, vector))

    def perturb(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Take one step of the walk, along sigma(t) noise."""
        return self.moved(x, broadcast(self.std(t), x) * noise)

    def diffuse(self, x: Tensor, t: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draw x_t given data x, as `SDE.diffuse`; its score given x is known on tori."""
        if self.manifold.flat:
            noisy = self.perturb(x, t, self.noise(x, generator))
            return noisy, self._conditional_score(x, t, noisy)
        size = broadcast(self.std(t), x) / math.sqrt(self.steps)
        for _ in range(self.steps):
            x = self.moved(x, size * self.noise(x, generator))
        return x, None

    def _conditional_score(self, x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        density = self.manifold.wrapped_normal(x, self.std(t).to(x))
        with torch.inference_mode(False), torch.enable_grad():
            at = noisy.detach().clone().requires_grad_()
            return torch.autograd.grad(density.log_prob(at).sum(), at)[0]

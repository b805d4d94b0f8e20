"""Score matching at all times of an SDE at once, as diffusion models are trained."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.distributions.noise import uniform_times_like
from divflow.divergence import Field
from divflow.operators.field import accumulation_dtype, as_time, checked_state
from divflow.score.field import Score, as_field
from divflow.score.objectives.denoising import DenoisingScoreMatching
from divflow.score.objectives.objective import Objective
from divflow.score.sde import SDE

__all__ = ["WEIGHTINGS", "TimeConditionalScoreMatching"]

WEIGHTINGS = ("uniform", "sigma2", "likelihood")
_KNOTS = 1_025
_DENOISING = DenoisingScoreMatching()


@dataclass(frozen=True)
class TimeConditionalScoreMatching(Objective):
    """Train a score at all times of an SDE at once, as diffusion models are trained.

        E over t of lambda(t) / p(t) * loss(s, t, x_t),   x_t = alpha(t) x + sigma(t) n,   t ~ p on [epsilon, T]

    (Song et al. 2021, arXiv:2101.09258, eq. 7). The expectation is the integral of lambda(t) times the expected loss at t,
    whatever p is. With the likelihood's weighting, lambda = g^2, it bounds the Kullback-Leibler divergence of the SDE's
    samples from the data, up to a constant, in nats (theorem 1 there).

    The inner objective is denoising, analytic in the noise, or implicit or sliced at the perturbed data. The latter vary
    less at small t, where denoising's target is as 1 / sigma.

    Args:
        sde: which perturbs the data.
        objective: at each time.
        weighting: lambda.

            - "uniform" is 1.
            - "sigma2" is sigma(t)^2, by which all times have equal weight for predicting the noise.
            - "likelihood" is g(t)^2.
        stratified: draw the k times of a batch from k equal parts of p, one each, in random order. Each time still follows
            p, but their mean varies far less (as Kingma et al. 2021, appendix I.1).
        importance: draw t from p proportional to lambda / sigma^2, where a denoising loss of an accurate score varies
            most; otherwise p is uniform. With the "sigma2" weighting both are the same.

    Raises:
        ValueError: an unknown weighting, a denoising objective with levels or weights of its own, or arguments that are not
            an SDE or an objective; denoising on a curved manifold.
        SDEError: an SDE of your own whose functions are not those of an SDE.

    Example:
        >>> from divflow.score import VariancePreserving
        >>> objective = TimeConditionalScoreMatching(VariancePreserving(), weighting="likelihood")
        >>> objective(lambda t, x: -x, torch.randn(4, 2)).shape
        torch.Size([4])
    """

    sde: SDE
    objective: Objective = _DENOISING
    weighting: str = "sigma2"
    stratified: bool = True
    importance: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sde, SDE):
            raise ValueError(f"sde must be an SDE, such as VariancePreserving(), but is {self.sde!r}")
        if not isinstance(self.objective, Objective) or isinstance(self.objective, TimeConditionalScoreMatching):
            raise ValueError(f"objective must be an objective at a single time, but is {self.objective!r}")
        if isinstance(self.objective, DenoisingScoreMatching) and self.objective != _DENOISING:
            raise ValueError(
                f"the SDE sets noise and weights, so the objective needs sigma=None and weighting='uniform', but has "
                f"sigma={self.objective.sigma!r} and weighting={self.objective.weighting!r}. Use DenoisingScoreMatching(), and the "
                "weighting of TimeConditionalScoreMatching."
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, but is {self.weighting!r}")
        manifold = self.sde.manifold
        if isinstance(self.objective, DenoisingScoreMatching) and manifold is not None and not manifold.flat:
            raise ValueError(
                f"denoising needs the score of x_t given a datum, which is not known on {manifold}. Use ImplicitScoreMatching() or "
                "SlicedScoreMatching(), by the command objective=implicit or objective=sliced."
            )
        self.sde.check()

    def __call__(
        self, score: Score, x: Tensor, t: Tensor | float | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Compute the losses of a batch of data, `(k,)`, differentiable in the score's parameters.

        Args:
            score: `score(t, x)`.
            x: data `(k, *event)`, without noise.
            t: times in (0, T], a scalar or one per sample, for lambda(t) loss(s, t, x_t) at these; drawn from p if None.
            generator: of times, noise and slices; torch's default one if None.

        Raises:
            FieldError: the score's value, x or t has a wrong type, shape, dtype or device.
            SDEError: t outside (0, T].
        """
        x = checked_state(x)
        if t is None:
            drawn = self.draw_times(x, generator)
            return self.loss(as_field(score), drawn.t, x, generator) / drawn.density
        t = as_time(t, x)
        self.sde.check_score_time(t)
        return self.loss(as_field(score), t, x, generator)

    def loss(
        self,
        score: Field,
        t: Tensor,
        x: Tensor,
        generator: Generator | None = None,
        conditional_score: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted losses of data x, perturbed to time t, as `Objective.loss`."""
        noisy, conditional_score = self.sde.diffuse(x, t, generator)
        losses = self.objective.loss(score, t, noisy, generator, conditional_score)
        return losses * _weights(self.sde, self.weighting, t).to(losses)

    def draw_times(self, x: Tensor, generator: Generator | None = None) -> "DrawnTimes":
        """Draw a time for each row of x, with its density."""
        u = uniform_times_like(x, generator, stratified=self.stratified)
        low, high = self.sde.epsilon, self.sde.T
        if self.importance:
            knots, cumulative = self._importance_table_on(x.device)
            cell = (torch.searchsorted(cumulative, u, right=True) - 1).clamp(0, len(knots) - 2)
            mass, width = cumulative[cell + 1] - cumulative[cell], knots[cell + 1] - knots[cell]
            t, density = knots[cell] + (u - cumulative[cell]) / mass * width, mass / width
        else:
            t, density = low + (high - low) * u, torch.full_like(u, 1 / (high - low))
        return DrawnTimes(t.to(x.dtype).clamp(low, high), density.to(accumulation_dtype(x)))

    def _importance_table_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table on a device, to which it is copied once, because the host waits for the copy."""
        if device not in self._importance_tables:
            knots, cumulative = self._importance_table
            self._importance_tables[device] = knots.to(device), cumulative.to(device)
        return self._importance_tables[device]

    @functools.cached_property
    def _importance_tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @functools.cached_property
    def _importance_table(self) -> tuple[Tensor, Tensor]:
        """Knots from epsilon to T, and the distribution function there of a density that is constant in between.

        The density follows lambda / sigma^2 at the middle of each cell. Losses are divided by this density itself, so they are
        unbiased however coarse the table is. The knots are geometric, because 1 / sigma^2 rises as 1 / t or faster.
        """
        low, high = self.sde.epsilon, self.sde.T
        knots = torch.logspace(math.log10(low), math.log10(high), _KNOTS, dtype=torch.float64, device="cpu")
        knots[0], knots[-1] = low, high
        middle = (knots[1:] * knots[:-1]).sqrt()
        mass = _weights(self.sde, self.weighting, middle) / self.sde.std(middle).square() * knots.diff()
        cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(dim=0)])
        return knots, cumulative / cumulative[-1]


class DrawnTimes(NamedTuple):
    """Times `(k,)` and the density of each, `(k,)`, on [epsilon, T]."""

    t: Tensor
    density: Tensor


def _weights(sde: SDE, weighting: str, t: Tensor) -> Tensor:
    if weighting == "uniform":
        return torch.ones_like(t)
    return sde.std(t).square() if weighting == "sigma2" else sde.coefficients(t).squared_diffusion

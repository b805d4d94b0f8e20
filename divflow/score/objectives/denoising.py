"""Denoising score matching: the score of noisy data, from the noise that was added."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from divflow.distributions.noise import integers_like, normal_like
from divflow.divergence import Field
from divflow.errors import check_positive
from divflow.operators.field import as_time, checked_state
from divflow.score.field import Score, as_field, evaluate
from divflow.score.objectives.objective import Objective, half_squared_norm, in_lengths
from divflow.score.sde import broadcast

__all__ = ["DenoisingScoreMatching"]


@dataclass(frozen=True)
class DenoisingScoreMatching(Objective):
    """Train a score to point from noisy data back to the data, without derivatives of s.

        |s(t, x + sigma n) + n / sigma|^2 / 2,    n standard normal

    (Vincent 2011, equation 9). Its minimiser is the score of the data with noise of standard deviation sigma, not that of
    the data. In expectation it is the implicit objective at x + sigma n plus D / (2 sigma^2). Its variance grows as
    1 / sigma^2.

    With several levels each sample draws one, uniformly, which s receives as its time (Song & Ermon 2019, equations 5 and
    6). Over an SDE (`TimeConditionalScoreMatching`) the level is sigma(t), so the objective takes none of its own.

    Args:
        sigma: standard deviation of the noise, or several; None for use over an SDE.
        weighting: "uniform", or "sigma2": each loss times sigma^2, which balances several levels.

    Raises:
        ValueError: a level that is not positive and finite, none at all, or an unknown weighting.

    Example:
        >>> DenoisingScoreMatching(sigma=0.1)(lambda t, x: -x, torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    sigma: float | Sequence[float] | None = None
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.sigma, Sequence) and not isinstance(self.sigma, str):
            object.__setattr__(self, "sigma", tuple(self.sigma))
            if not self.sigma:
                raise ValueError("sigma must contain at least one noise level, but is empty")
        if self.sigma is not None:
            for level in self.sigma if isinstance(self.sigma, tuple) else (self.sigma,):
                check_positive("a noise level, sigma,", level)
        if self.weighting not in ("uniform", "sigma2"):
            raise ValueError(f"weighting must be 'uniform' or 'sigma2', but is {self.weighting!r}")

    def __call__(
        self, score: Score, x: Tensor, t: Tensor | float | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Compute the losses of a batch, as `Objective`; with several levels the time is the level, and must be left out.

        Raises:
            FieldError: the score's value, x or t has a wrong type, shape, dtype or device.
            ValueError: no level, or a time beside several.
        """
        if self.sigma is None:
            raise ValueError(
                "DenoisingScoreMatching has no noise level. Build it with a level, such as sigma=0.1, or use it over an SDE, by "
                "TimeConditionalScoreMatching(sde)."
            )
        x, several = checked_state(x), isinstance(self.sigma, tuple)
        if several and t is not None:
            raise ValueError(f"with several noise levels, {self.sigma}, the score's time is the level. Leave t out.")
        level = torch.as_tensor(self.sigma, dtype=x.dtype, device=x.device)
        if several:
            level = level[integers_like(x, len(level), generator)]
        time = level if several else as_time(0.0 if t is None else t, x)
        scale, noise = broadcast(level, x), normal_like(x, generator)
        losses = self.loss(as_field(score), time, x + scale * noise, generator, -noise / scale)
        return losses * level**2 if self.weighting == "sigma2" else losses

    def loss(
        self,
        score: Field,
        t: Tensor,
        x: Tensor,
        generator: Generator | None = None,
        conditional_score: Tensor | None = None,
    ) -> Tensor:
        """Compute |s(t, x) - conditional_score|^2 / 2, as `Objective.loss`.

        Raises:
            ValueError: no conditional score, with which this objective compares.
        """
        if conditional_score is None:
            raise ValueError(
                "denoising needs the conditional_score of the noisy x. Call the objective itself, which adds the noise."
            )
        return half_squared_norm(in_lengths(score, evaluate(score, t, x) - conditional_score))

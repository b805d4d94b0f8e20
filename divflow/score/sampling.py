"""Samples of a score model: the probability-flow ODE, the reverse-time SDE, predictor-corrector and Langevin dynamics."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from divflow.distributions.noise import drawn_like, normal_like
from divflow.divergence import Field
from divflow.errors import DivflowError, check_count, check_positive, checked_event_shape
from divflow.flow.settings import tensor_settings
from divflow.operators.field import as_time, checked_state, flatten_event
from divflow.score.field import Score, as_field, evaluate
from divflow.score.prior import Prior
from divflow.score.probability_flow import probability_flow
from divflow.score.sde import SDE, broadcast
from divflow.solver import Solver

__all__ = [
    "AnnealedLangevin",
    "PredictorCorrector",
    "ProbabilityFlowODE",
    "ReverseSDE",
    "Sampler",
    "Samples",
    "SamplingError",
    "denoise",
]

_SOLVER = Solver()


class SamplingError(DivflowError, RuntimeError):
    """A sampler produced numbers that are not finite, or its settings must lead to them."""


class Samples(NamedTuple):
    """Samples and the cost of drawing them.

    Attributes:
        samples: `(n, *event)`.
        evaluations: of the score; a batch counts once.
    """

    samples: Tensor
    evaluations: int


class Sampler(ABC):
    """Base class of the ways from a score to samples of its density."""

    @torch.no_grad()
    def __call__(self, score: Score, num_samples: int, generator: Generator | None = None) -> Samples:
        """Draw samples, without gradient.

        Args:
            score: `score(t, x)`, or `score(x)`. If it is a module, samples have its parameters' dtype and device.
            num_samples: how many.
            generator: of everything that is drawn, so that a seed reproduces the samples; torch's default one if None.

        Raises:
            FieldError: the score's value does not have x's shape, dtype and device.
            SamplingError: samples that are not finite.
            SDEError: the SDE has no event shape.
            SolverError: the ODE could not be solved.
        """
        check_count("num_samples", num_samples, least=0)
        counted = _Counted(as_field(score))
        start = self._start(torch.empty(num_samples, *self._event_shape(), **tensor_settings(score)), generator)
        samples = self._run(counted, start, generator)
        bad = ~torch.isfinite(flatten_event(samples)).all(dim=1)
        if bad.any():
            raise SamplingError(
                f"{int(bad.sum())} of {num_samples} samples of {self} are not "
                "finite. Take more or smaller steps, or train the score further."
            )
        return Samples(samples, counted.count)

    @abstractmethod
    def _event_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def _start(self, like: Tensor, generator: Generator | None) -> Tensor:
        """The initial noise, of the shape, dtype and device of `like`."""

    @abstractmethod
    def _run(self, score: Field, x: Tensor, generator: Generator | None) -> Tensor: ...


@dataclass(frozen=True)
class _SDESampler(Sampler):
    """A sampler that starts at the prior of an SDE, at T, and ends at epsilon."""

    sde: SDE

    def __post_init__(self) -> None:
        if not isinstance(self.sde, SDE):
            raise ValueError(f"sde must be an SDE, such as VariancePreserving(event_shape=2), but is {self.sde!r}")

    def _event_shape(self) -> tuple[int, ...]:
        return tuple(self.sde.prior.event_shape)

    def _start(self, like: Tensor, generator: Generator | None) -> Tensor:
        prior = self.sde.prior
        return prior.draw(like, generator) if isinstance(prior, Prior) else drawn_like(like, prior, generator)


@dataclass(frozen=True)
class ProbabilityFlowODE(_SDESampler):
    """Draw samples by the probability-flow ODE from T to epsilon: a deterministic map of the prior's noise.

        dx/dt = f x - g^2 s / 2

    Args:
        sde: with an event shape.
        solver: of the ODE, adaptive by default.
        denoise: end with the mean of the data given x_epsilon (`denoise`), one more evaluation. Off by default, so that the
            samples follow the density of the probability flow's `log_prob`.
    """

    solver: Solver = _SOLVER
    denoise: bool = False

    def _run(self, score: Field, x: Tensor, generator: Generator | None) -> Tensor:
        flow = probability_flow(score, self.sde, solver=self.solver)
        # A decade at a time: an adaptive step from T down to epsilon could skip what changes near epsilon.
        decades = math.ceil(math.log10(self.sde.T / self.sde.epsilon))
        times = torch.logspace(math.log10(self.sde.T), math.log10(self.sde.epsilon), decades + 1, device="cpu").tolist()
        for start, stop in itertools.pairwise([self.sde.T, *times[1:-1], self.sde.epsilon]):
            x = flow.trajectory(x, [start, stop])[-1]
        return denoise(score, self.sde, x) if self.denoise else x


@dataclass(frozen=True)
class ReverseSDE(_SDESampler):
    """Draw samples by the reverse-time SDE from T to epsilon (Anderson 1982), solved by Euler-Maruyama.

        dx = (f x - g^2 s) dt + g dw

    The times are the squares of equidistant numbers, so the steps shrink towards epsilon: the noise of the last ones would
    stay in the samples. Noise corrects errors of the score that the ODE would keep, at more evaluations.

    Args:
        sde: with an event shape.
        num_steps: evaluations, except the one of `denoise`.
        denoise: end with the mean of the data given x_epsilon, one more evaluation.

    Raises:
        ValueError: fewer than one step.

    Example:
        >>> from divflow.score import VariancePreserving
        >>> ReverseSDE(VariancePreserving(event_shape=2), num_steps=10)(lambda t, x: -x, 4).samples.shape
        torch.Size([4, 2])
    """

    num_steps: int = 500
    denoise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_steps", self.num_steps)

    def _run(self, score: Field, x: Tensor, generator: Generator | None) -> Tensor:
        for t, step in _time_steps(self.sde, self.num_steps, x):
            x = _reverse_step(score, self.sde, x, t, step, generator)
        return denoise(score, self.sde, x) if self.denoise else x


@dataclass(frozen=True)
class PredictorCorrector(_SDESampler):
    """Draw samples by steps of `ReverseSDE`, each followed by Langevin steps at its new time (Song et al. 2021, algorithm 1).

        x <- x + a s(t, x) + sqrt(2 a) n,   a = 2 (snr sigma(t))^2

    The step size depends on time alone; it is the original's for a score of norm |n| / sigma(t). The original uses norms
    averaged over the batch, which lets samples depend on each other.

    Args:
        sde: with an event shape.
        num_steps: of the predictor.
        corrector_steps: Langevin steps after each. The evaluations are num_steps (1 + corrector_steps), and one to denoise.
        snr: the step's length relative to the noise's standard deviation.
        denoise: end with the mean of the data given x_epsilon, one more evaluation.

    Raises:
        ValueError: fewer than one step, or an snr that is not positive.
    """

    num_steps: int = 250
    corrector_steps: int = 1
    snr: float = 0.16
    denoise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_steps", self.num_steps)
        check_count("corrector_steps", self.corrector_steps)
        check_positive("snr", self.snr)

    def _run(self, score: Field, x: Tensor, generator: Generator | None) -> Tensor:
        for t, step in _time_steps(self.sde, self.num_steps, x):
            x = _reverse_step(score, self.sde, x, t, step, generator)
            t = t - step
            for _ in range(self.corrector_steps):
                size = 2 * (self.snr * self.sde.std(t)).square()
                langevin = size * evaluate(score, t, x) + (2 * size).sqrt() * self.sde.noise(x, generator)
                x = self.sde.moved(x, langevin)
        return denoise(score, self.sde, x) if self.denoise else x


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Draw samples by Langevin dynamics at a falling sequence of noise levels, without an SDE.

        x <- x + a s(sigma, x) + sqrt(2 a) n,   a = 2 (snr sigma)^2

    (Song & Ermon 2019, algorithm 1). The score gets the level as its time, as `DenoisingScoreMatching` of several levels
    trains it. For a score without time the levels are step sizes only, and one level is plain, unadjusted Langevin
    dynamics, whose bias falls with `snr`. Without noise levels in training, modes of the density that are far from each
    other mix slowly, if ever.

    Args:
        event_shape: shape of one sample; an int for vectors.
        sigmas: the levels, in the order they are taken.
        steps_per_level: evaluations at each.
        snr: the step's length relative to the level. The drift is stable if 2 (snr sigma)^2 is below twice the smallest
            variance of the density at that level.
        initial_std: standard deviation of the normal initial states; the first level if None.
        denoise: end with x + sigma^2 s(sigma, x) at the last level, one more evaluation; for levels that were trained with
            noise.

    Raises:
        ValueError: no or non-positive levels, snr or initial_std, or fewer than one step.
    """

    event_shape: tuple[int, ...]
    sigmas: tuple[float, ...]
    steps_per_level: int = 100
    snr: float = 0.16
    initial_std: float | None = None
    denoise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "event_shape", checked_event_shape(self.event_shape))
        object.__setattr__(self, "sigmas", tuple(self.sigmas) if isinstance(self.sigmas, Sequence) else (self.sigmas,))
        if not self.sigmas:
            raise ValueError("sigmas must contain at least one noise level, but is empty")
        for level in self.sigmas:
            check_positive("a noise level", level)
        check_count("steps_per_level", self.steps_per_level)
        check_positive("snr", self.snr)
        if self.initial_std is not None:
            check_positive("initial_std", self.initial_std)

    def _event_shape(self) -> tuple[int, ...]:
        return self.event_shape

    def _start(self, like: Tensor, generator: Generator | None) -> Tensor:
        std = self.sigmas[0] if self.initial_std is None else self.initial_std
        return std * normal_like(like, generator)

    def _run(self, score: Field, x: Tensor, generator: Generator | None) -> Tensor:
        for sigma in self.sigmas:
            level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
            for _ in range(self.steps_per_level):
                x = _langevin_step(score, x, level, 2 * (self.snr * level).square(), generator)
        return x + level.square() * evaluate(score, level, x) if self.denoise else x


def denoise(score: Score, sde: SDE, x: Tensor, t: Tensor | float | None = None) -> Tensor:
    """Compute the mean of the data given x_t, by Tweedie's formula.

        E[x_0 | x_t] = (x_t + sigma(t)^2 s(t, x_t)) / alpha(t)

    Args:
        score: `score(t, x)`.
        sde: alpha and sigma.
        x: states `(k, *event)` at time t.
        t: a scalar or one time per sample; sde.epsilon if None.

    Raises:
        FieldError: the score's value, x or t has a wrong type, shape, dtype or device.
        SDEError: t outside (0, T].
    """
    t = as_time(sde.epsilon if t is None else t, checked_state(x))
    sde.check_score_time(t)
    alpha, sigma = (broadcast(values, x) for values in (sde.mean_scale(t), sde.std(t)))
    return sde.moved(x, sigma.square() * evaluate(as_field(score), t, x)) / alpha


class _Counted(nn.Module):
    """A score that counts its evaluations."""

    def __init__(self, score: Field) -> None:
        super().__init__()
        self.score, self.count = score, 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return self.score(t, x)


def _time_steps(sde: SDE, count: int, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(t, length) of `count` steps from T down to epsilon, each shorter than the one before."""
    times = torch.linspace(sde.T**0.5, sde.epsilon**0.5, count + 1, dtype=torch.float64, device="cpu").square()
    times[0], times[-1] = sde.T, sde.epsilon
    times = times.to(x)
    return list(zip(times[:-1], times[:-1] - times[1:], strict=True))


def _reverse_step(score: Field, sde: SDE, x: Tensor, t: Tensor, step: Tensor, generator: Generator | None) -> Tensor:
    drift, squared_diffusion = sde.coefficients(t)
    mean = step * (squared_diffusion * evaluate(score, t, x) - drift * x)
    return sde.moved(x, mean + (squared_diffusion * step).sqrt() * sde.noise(x, generator))


def _langevin_step(score: Field, x: Tensor, t: Tensor, size: Tensor, generator: Generator | None) -> Tensor:
    return x + size * evaluate(score, t, x) + (2 * size).sqrt() * normal_like(x, generator)

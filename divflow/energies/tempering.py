"""Samples of a Boltzmann density, and its log Z, by parallel tempering from a normal density."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from divflow.distributions.noise import normal_like, uniform_like
from divflow.energies.bennett import log_ratios
from divflow.energies.pairs import EnergyError, PairEnergy, check_energy
from divflow.errors import check_count, check_generator, check_positive

__all__ = ["Tempered", "Tempering"]

# Target acceptance of Hamiltonian moves; near the best for a few leapfrog steps (Beskos et al. 2013).
_ACCEPTANCE = 0.7
_BLOCKS = 20
# Neighbours that exchange states less often than this do not mix.
_EXCHANGED = 0.02


class Tempered(NamedTuple):
    """Results of parallel tempering for a density exp(-U(x)) / Z.

    Attributes:
        samples: `(num_samples, n, d)`, chain after chain, with centre of mass zero.
        log_normalizer: log Z, in nats.
        standard_error: standard error of log Z, in nats, from blocks of chains.
        acceptance: share of accepted Hamiltonian moves at the target, in [0, 1].
        exchanged: share of accepted exchanges between neighbouring rungs, `(rungs,)`; NaN where none was tried.
    """

    samples: Tensor
    log_normalizer: float
    standard_error: float
    acceptance: float
    exchanged: Tensor


@dataclass(frozen=True)
class Tempering:
    """Sample particles by parallel tempering (Geyer 1991), from a normal density to exp(-U(x)) / Z.

        p_k(x) is proportional to exp(-(1 - beta_k) |x|^2 / (2 std^2) - beta_k U(x)),      beta_k = (k / rungs)^power

    - The centre of mass of the particles is zero.
    - Rung 0 is drawn anew at each sweep, so that chains forget their past.
    - The other rungs move by Hamiltonian Monte Carlo (Duane et al. 1987), whose step sizes adapt while they warm up and are
      fixed from then on; neighbours exchange their states.
    - An energy that diverges as r^-12 where particles meet has a log Z that grows as beta^(d / 12), so power = 4 suits three
      dimensions.
    - log Z comes from the same run: that of rung 0 is known, and Bennett's method (1976) gives the ratios of neighbours.

    Args:
        rungs: number of rungs above the normal density.
        power: of the ladder.
        std: standard deviation of the normal density, at least as wide as the target.
        chains: number of ladders, side by side.
        warm_up: sweeps before the first sample.
        thin: sweeps between two samples of a chain.
        leapfrog: steps of a Hamiltonian move.

    Raises:
        ValueError: an option is not a number of its kind.
        EnergyError: in a call, the energy is no `PairEnergy`, has no gradient, or is NaN where the normal density is; samples or their
            energies are not finite; or neighbours hardly ever exchange states.
    """

    rungs: int = 16
    power: float = 4.0
    std: float = 1.0
    chains: int = 500
    warm_up: int = 300
    thin: int = 5
    leapfrog: int = 4

    def __post_init__(self) -> None:
        for name in ("rungs", "thin", "leapfrog"):
            check_count(name, getattr(self, name))
        check_count("chains", self.chains, least=_BLOCKS)
        check_count("warm_up", self.warm_up, least=0)
        for name in ("power", "std"):
            check_positive(name, getattr(self, name))

    def __call__(self, energy: PairEnergy, num_samples: int, generator: Generator | None = None) -> Tempered:
        """Samples and log Z of the Boltzmann density of an energy, in float32, the same for the same seed.

        Args:
            energy: energy in kT; +inf where the density vanishes.
            num_samples: number of samples.
            generator: of all random numbers; torch's default one if None.
        """
        check_energy(energy)
        check_count("num_samples", num_samples)
        check_generator(generator)
        ladder = _Ladder(energy, self, generator)
        for sweep in range(self.warm_up):
            ladder.sweep(sweep, adapt=True)
        collected, works = [], []
        ladder.forget()
        rounds = math.ceil(num_samples / self.chains)
        for sweep in range(rounds * self.thin):
            ladder.sweep(sweep)
            if (sweep + 1) % self.thin == 0:
                collected.append(ladder.x[-1])
                works.append(ladder.tilts())
        samples = torch.stack(collected, dim=1).flatten(0, 1)[:num_samples]
        exchanged = ladder.exchanged / ladder.tried
        tilts = torch.stack(works, dim=-1)
        self._check(samples, tilts[-1], exchanged)
        log_normalizer, error = self._log_normalizer(tilts, energy)
        acceptance = float(ladder.accepted[-1] / (rounds * self.thin))
        return Tempered(samples - samples.mean(dim=1, keepdim=True), log_normalizer, error, acceptance, exchanged)

    def betas(self) -> Tensor:
        """Beta of each rung, from 0 to 1, `(rungs + 1,)`."""
        return (torch.arange(self.rungs + 1, dtype=torch.float32, device="cpu") / self.rungs) ** self.power

    def _check(self, samples: Tensor, tilts: Tensor, exchanged: Tensor) -> None:
        if not samples.isfinite().all():
            raise EnergyError(
                f"samples of {self} are not finite. Choose std so that the normal density covers the target"
            )
        if not tilts.isfinite().all():
            raise EnergyError(
                f"the energy of {(~tilts.isfinite()).double().mean():.1%} of the samples of {self} is not finite. Make it finite wherever the "
                "density does not vanish, or warm up longer"
            )
        if exchanged.nan_to_num(1.0).min() < _EXCHANGED:
            raise EnergyError(
                f"a rung of {self} exchanges only {exchanged.nan_to_num(1.0).min():.1%} of its states with the next, which cuts the target "
                "off from the normal density. Take more rungs, another power, or another std"
            )

    def _log_normalizer(self, tilts: Tensor, energy: PairEnergy) -> tuple[float, float]:
        """Log Z and its standard error, of tilts U - |x|^2 / (2 std^2) at all rungs, `(rungs + 1, chains, samples)`."""
        freedom = (energy.particles - 1) * energy.dimensions
        reference = freedom / 2 * math.log(2 * math.pi * self.std**2)
        betas = self.betas().double()
        everything = reference + log_ratios(tilts.flatten(1), betas).sum()
        blocks = torch.stack([log_ratios(part.flatten(1), betas).sum() for part in tilts.tensor_split(_BLOCKS, dim=1)])
        return float(everything), float(blocks.std() / math.sqrt(_BLOCKS))


class _Ladder:
    """States of all rungs and chains, `(rungs + 1, chains, n, d)`, with their energies and gradients."""

    def __init__(self, energy: PairEnergy, settings: Tempering, generator: Generator | None) -> None:
        self.energy, self.settings, self.generator = energy, settings, generator
        beta = settings.betas()[1:]
        self.beta, self.stride = beta[:, None], (settings.betas()[1:] - settings.betas()[:-1])[:, None]
        self.step = torch.full_like(self.beta, 0.05 * settings.std)
        self.x = settings.std * self._centered(beta.new_empty(settings.rungs + 1, settings.chains, *energy.event_shape))
        self.u, self.gradient = self._evaluate(self.x)
        self._check_nan(self.u)
        self.forget()

    def forget(self) -> None:
        """Reset the counts of acceptances."""
        self.accepted, self.exchanged, self.tried = (torch.zeros(self.settings.rungs, device="cpu") for _ in range(3))

    def sweep(self, number: int, adapt: bool = False) -> None:
        """One move of every rung, and the exchanges of every second pair of neighbours."""
        self._redraw()
        self._move(adapt)
        self._exchange(number % 2)

    def tilts(self) -> Tensor:
        """U - |x|^2 / (2 std^2), what beta multiplies, `(rungs + 1, chains)`, in float64."""
        return self.u.double() - self._reference(self.x.double())

    def _redraw(self) -> None:
        fresh = self.settings.std * self._centered(self.x[:1])
        u, gradient = self._evaluate(fresh)
        self._check_nan(u)
        self.x, self.u = torch.cat([fresh, self.x[1:]]), torch.cat([u, self.u[1:]])
        self.gradient = torch.cat([gradient, self.gradient[1:]])

    def _move(self, adapt: bool) -> None:
        x, u, gradient = self.x[1:], self.u[1:], self.gradient[1:]
        momentum = self._centered(x)
        before = self._action(x, u) + momentum.square().sum(dim=(2, 3)) / 2
        # A random length, because one that fits a period would go in circles.
        step = self.step * (0.7 + 0.6 * self._uniform(u.shape))
        step = step[..., None, None]
        y, energies, slope = x, u, gradient
        momentum = momentum + step / 2 * self._force(y, slope)
        for i in range(self.settings.leapfrog):
            y = y + step * momentum
            energies, slope = self._evaluate(y)
            last = i == self.settings.leapfrog - 1
            momentum = momentum + (step / 2 if last else step) * self._force(y, slope)
        after = self._action(y, energies) + momentum.square().sum(dim=(2, 3)) / 2
        # What is NaN is refused.
        taken = self._uniform(u.shape) < (before - after).exp()
        rate = taken.float().mean(dim=1)
        self.accepted = self.accepted + rate
        if adapt:
            self.step = self.step * (0.2 * (rate - _ACCEPTANCE)).exp()[:, None]
        where = taken[..., None, None]
        self.x = torch.cat([self.x[:1], torch.where(where, y, x)])
        self.u = torch.cat([self.u[:1], torch.where(taken, energies, u)])
        self.gradient = torch.cat([self.gradient[:1], torch.where(where, slope, gradient)])

    def _exchange(self, parity: int) -> None:
        lower = torch.arange(parity, self.settings.rungs, 2, device="cpu")
        if len(lower) == 0:
            return
        tilt = self.u - self._reference(self.x)
        log_ratio = self.stride[lower] * (tilt[lower + 1] - tilt[lower])
        taken = self._uniform(log_ratio.shape) < log_ratio.exp()
        self.exchanged[lower] += taken.float().mean(dim=1)
        self.tried[lower] += 1
        for states in (self.x, self.u, self.gradient):
            where = taken.view(*taken.shape, *[1] * (states.ndim - 2))
            low, high = states[lower], states[lower + 1]
            states[lower], states[lower + 1] = torch.where(where, high, low), torch.where(where, low, high)

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.energy(x.flatten(0, 1).clone())  # a copy of the chains' states, to which an energy may write
            if not u.requires_grad:
                raise EnergyError(
                    f"{self.energy} has no gradient, which Hamiltonian moves need. Let `pair` compute it from the squared distances by torch, "
                    "without detach() or no_grad()"
                )
            (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach().view(x.shape[:2]), gradient

    def _check_nan(self, u: Tensor) -> None:
        """Refuse an energy that is NaN at draws of the normal density, where chains begin; moves to NaN are rejected later."""
        if u.isnan().any():
            raise EnergyError(
                f"{self.energy} is NaN, so not finite, at {u.isnan().double().mean():.1%} of the states of a normal density of std "
                f"{self.settings.std}. Return +inf where the density vanishes, or take a smaller std if it overflows"
            )

    def _reference(self, x: Tensor) -> Tensor:
        return x.square().sum(dim=(2, 3)) / (2 * self.settings.std**2)

    def _action(self, x: Tensor, u: Tensor) -> Tensor:
        return self.beta * u + (1 - self.beta) * self._reference(x)

    def _force(self, x: Tensor, gradient: Tensor) -> Tensor:
        beta = self.beta[..., None, None]
        return -beta * gradient - (1 - beta) / self.settings.std**2 * x

    def _uniform(self, shape: torch.Size) -> Tensor:
        return uniform_like(self.x.new_empty(shape), self.generator)

    def _centered(self, like: Tensor) -> Tensor:
        noise = normal_like(like, self.generator)
        return noise - noise.mean(dim=2, keepdim=True)

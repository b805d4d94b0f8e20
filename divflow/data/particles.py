"""Particles of a known energy, sampled from their Boltzmann density."""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from divflow.data.cache import StaleError, cache_folder, cached
from divflow.data.module import DataError, Rows, TensorDataModule
from divflow.energies import DoubleWell, EnergyError, PairEnergy, Tempering, quartet
from divflow.energies.pairs import check_energy
from divflow.flow.transforms import MeanFreeScale

__all__ = ["Particles"]

# Version of the sampling; another one makes cached files again.
_VERSION = 1


class Particles(TensorDataModule):
    """Samples of the Boltzmann density exp(-U(x)) / Z of particles.

    - A run reports its gap to the truth, as for `Toy`: an estimate of the Kullback-Leibler divergence from the model to the truth. It
      is as precise as `log_normalizer`. Samples of the model can be weighted towards the density.
    - The centre of mass is zero, and one scale standardizes all entries. Flows need base=mean_free and a velocity that keeps the
      centre of mass.
    - Parallel tempering makes the samples at first use, in seconds (DW4) or minutes (LJ13) on one core. They are kept with their
      energies, and made again if the energy differs from these, because its formula has changed or the file is damaged.
    - Splits are consecutive rows, chain after chain, so at most one chain lies on both sides of a border.
    - Rows of a chain are dependent. The variance of the mean of U is 1.2 times that of independent rows for DW4 as configured, and
      4.2 times for LJ13. Standard errors over test rows assume independence and are too small by factors of about 1.1 and 2.

    Args:
        energy: U, in kT.
        sampler: sampler of its density.
        num_train: number of training samples.
        num_val: number of validation samples.
        num_test: number of test samples.
        num_weighted: samples of the model that the test weights towards the density.
        batch_size: samples a training step, in each process.
        eval_batch_size: samples a validation or test step; `batch_size` if None.
        seed: of all samples.
        cache: folder where samples are kept; `~/.cache/divflow` if None.

    Attributes:
        log_normalizer: log Z, in nats: by quadrature for a `DoubleWell` of four particles in the plane, if that resolves it; otherwise
            by the sampler.
        log_normalizer_error: its standard error; zero by quadrature, whose error is below 1e-4.
        free_energy_difference: by quadrature, in kT; otherwise None.

    Raises:
        DataError: a split has fewer than two samples, or the cache can't be written to.
        EnergyError: the energy is no `PairEnergy`, or the sampler does not suit it.
    """

    energy: PairEnergy

    def __init__(
        self,
        energy: PairEnergy,
        sampler: Tempering,
        num_train: int = 100_000,
        num_val: int = 2_000,
        num_test: int = 10_000,
        num_weighted: int = 10_000,
        batch_size: int = 256,
        eval_batch_size: int | None = 1_000,
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check_energy(energy)
        for name, count in {
            "num_train": num_train,
            "num_val": num_val,
            "num_test": num_test,
            "num_weighted": num_weighted,
        }.items():
            if count < 2:
                raise DataError(f"{name} must be at least 2, but is {count}")
        self.energy, self.event_shape = energy, energy.event_shape
        self.num_weighted = num_weighted
        sizes = [num_test, num_val, num_train]

        def make() -> dict[str, Tensor | float]:
            found = sampler(energy, sum(sizes), Generator().manual_seed(seed))
            names = ("samples", "log_normalizer", "standard_error")
            return {name: getattr(found, name) for name in names} | {"energies": _energies(energy, found.samples)}

        def check(found: dict[str, Any]) -> None:
            _check(found, energy, sum(sizes))

        folder = cache_folder() if cache is None else Path(cache).expanduser()
        name = f"{type(energy).__name__}-{energy.particles}-{energy.dimensions}"
        made = cached(folder, name, f"{energy}, {sampler}, {sum(sizes)} samples, seed {seed}", _VERSION, make, check)
        test, val, train = made["samples"].split(sizes)
        self.train, self.val, self.test = Rows(train), Rows(val), Rows(test)
        self.transform = MeanFreeScale(train.std())
        self.log_normalizer, self.log_normalizer_error = made["log_normalizer"], made["standard_error"]
        self.free_energy_difference: float | None = None
        if energy.event_shape == (4, 2) and isinstance(energy, DoubleWell):
            try:
                known = quartet(energy, energy.d0)
            except EnergyError as error:
                print(f"log Z is the sampler's: {error}")
            else:
                self.log_normalizer, self.log_normalizer_error = known.log_normalizer, 0.0
                self.free_energy_difference = energy.free_energy_difference(
                    torch.tensor(known.beyond, device="cpu")
                ).item()

    def log_prob(self, x: Tensor) -> Tensor:
        """True log-density of x `(k, n, d)` in nats, `(k,)`."""
        return -self.energy(x.clone()) - self.log_normalizer


def _energies(energy: PairEnergy, samples: Tensor) -> Tensor:
    """Energy of each sample in float64, computed in parts to bound the memory."""
    with torch.no_grad():
        return torch.cat([energy(part.to(torch.float64, copy=True)) for part in samples.split(10_000)])


def _check(found: dict[str, Any], energy: PairEnergy, count: int) -> None:
    """Refuse kept samples that are incomplete, or of another energy: the key has the energy's parameters, but not its formula.

    Raises:
        StaleError: with the reason.
    """
    for name, shape in {"samples": (count, *energy.event_shape), "energies": (count,)}.items():
        value = found.get(name)
        if not isinstance(value, Tensor) or value.shape != shape:
            raise StaleError(f"has no {name} of shape {shape}")
    for name in ("log_normalizer", "standard_error"):
        if not isinstance(found.get(name), float):
            raise StaleError(f"has no number {name}")
    if not torch.allclose(_energies(energy, found["samples"]), found["energies"].double(), rtol=1e-6, atol=1e-6):
        raise StaleError(
            "has samples whose energies differ from those that it holds: the formula of the energy has changed, or the file is damaged"
        )

"""Simulators on which the literature compares posteriors."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from divflow.data.module import DataError
from divflow.data.simulator import Simulator

__all__ = ["Simulations", "slcp", "two_moons"]

# Observations of each task, in the package sbibm.
_OBSERVATIONS = 10


class _Simulator(NamedTuple):
    """Parameters are uniform in [-bound, bound]."""

    parameters: int
    bound: float
    simulate: Callable[[Tensor, Generator | None], Tensor]


class Simulations(Simulator):
    """A simulator of the literature, by name; the density of the flow is the posterior of its parameters.

    Simulators and priors are those of Lueckmann et al. 2021 (arXiv:2101.04653, tasks T.3 and T.8). Their package sbibm ships ten
    observations of each with samples of the posteriors (`observation`, `reference`).

    Args:
        name: "two_moons" or "slcp".
        num_simulations: number of simulations, a tenth of them for validation.
        num_test: number of further simulations, for the test.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        seed: of all simulations.

    Attributes:
        simulator: name of the simulator.
        columns: names of the parameters.

    Raises:
        DataError: the name is another one, or there are too few simulations.

    Example:
        >>> x, context = next(iter(Simulations("slcp", 1000, batch_size=10).train_dataloader()))
        >>> x.shape, context.shape
        (torch.Size([10, 5]), torch.Size([10, 8]))
    """

    def __init__(
        self,
        name: str,
        num_simulations: int = 10_000,
        num_test: int = 2_000,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if name not in _SIMULATORS:
            raise DataError(
                f"data.name must be one of {', '.join(_SIMULATORS)}, but there is no simulator {name!r}. For one of your own, use data=simulator"
            )
        self.simulator = name
        size, bound, simulate = _SIMULATORS[name]
        prior = [(-bound, bound)] * size
        super().__init__(simulate, prior, num_simulations, num_test, batch_size, eval_batch_size, seed)

    def observation(self, number: int) -> Tensor:
        """One of sbibm's observations, numbered from 1 to 10, as a context `(context_features,)`.

        Raises:
            DataError: the number is another one, or sbibm is not installed.
        """
        return self._read(number, "observation.csv")[0]

    def reference(self, number: int) -> Tensor:
        """10,000 samples of the posterior of one of sbibm's observations, `(10000, D)`.

        Raises:
            DataError: the number is another one, or sbibm is not installed.
        """
        return self._read(number, "reference_posterior_samples.csv.bz2")

    def _read(self, number: int, file: str) -> Tensor:
        if not 1 <= number <= _OBSERVATIONS:
            raise DataError(f"the number of an observation must be from 1 to {_OBSERVATIONS}, but is {number}")
        spec = importlib.util.find_spec("sbibm")  # not imported: that needs packages which reading its files does not
        if spec is None or spec.origin is None:
            raise DataError(
                "observations and their posteriors are files of the package sbibm, which is not installed. Install it without "
                "its dependencies, which do not fit current versions: pip install --no-deps sbibm"
            )
        path = Path(spec.origin).parent / "tasks" / self.simulator / "files" / f"num_observation_{number}" / file
        if not path.is_file():
            raise DataError(
                f"the package sbibm has no {path}, which version 1.1.0 has. Install it: pip install --no-deps sbibm==1.1.0"
            )
        return torch.from_numpy(np.loadtxt(path, np.float32, delimiter=",", skiprows=1, ndmin=2))


def two_moons(parameters: Tensor, generator: Generator | None = None) -> Tensor:
    """A point of a crescent, moved by the two parameters; their posterior is two crescents (Greenberg et al. 2019).

        x = (r cos a + 1/4 - |p_1 + p_2| / sqrt 2, r sin a + (p_2 - p_1) / sqrt 2),   a ~ U(-pi/2, pi/2), r ~ N(0.1, 0.01^2)

    Args:
        parameters: `(k, 2)`.
        generator: of a and r.

    Returns:
        `(k, 2)`.
    """
    first, second = parameters.unbind(dim=1)
    angle = math.pi * (torch.rand(len(parameters), generator=generator, device="cpu") - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(parameters), generator=generator, device="cpu")
    x = radius * angle.cos() + 0.25 - (first + second).abs() / math.sqrt(2)
    return torch.stack([x, radius * angle.sin() + (second - first) / math.sqrt(2)], dim=1)


def slcp(parameters: Tensor, generator: Generator | None = None) -> Tensor:
    """Four draws of a normal density in the plane: a simple likelihood with a complex posterior (Papamakarios et al. 2019).

        N((p_1, p_2), S),   standard deviations p_3^2 and p_4^2, correlation tanh p_5

    Args:
        parameters: `(k, 5)`.
        generator: of the draws.

    Returns:
        `(k, 8)`, one draw after another.
    """
    mean, deviations, correlation = parameters[:, None, :2], parameters[:, None, 2:4].square(), parameters[:, 4].tanh()
    noise = torch.randn(len(parameters), 4, 2, generator=generator, device="cpu")
    first, second = noise.unbind(dim=2)
    mixed = correlation[:, None] * first + (1 - correlation.square())[:, None].sqrt() * second
    return (mean + deviations * torch.stack([first, mixed], dim=2)).flatten(1)


_SIMULATORS = {"two_moons": _Simulator(2, 1.0, two_moons), "slcp": _Simulator(5, 3.0, slcp)}

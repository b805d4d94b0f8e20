"""Parameters and their simulations, for posteriors p(parameters | observation) by conditional flows."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Generator, Tensor
from torch.distributions import Distribution

from divflow.data.module import DataError, Rows, TensorDataModule
from divflow.errors import checked_range
from divflow.flow.transforms import Affine

__all__ = ["Prior", "Simulator"]

Ranges = Mapping[str, Sequence[float]] | Sequence[Sequence[float]]
Prior = Ranges | Distribution
"""Of parameters: ranges [low, high] in which they are uniform, by their names or in their order; or a distribution of vectors."""


class Simulator(TensorDataModule):
    """Parameters drawn from a prior, each with its simulation as context, for flows whose density is the posterior.

    A conditional flow that is trained on these pairs, by maximum likelihood or flow matching, estimates the posterior for every
    observation at once (neural posterior estimation, Papamakarios and Murray 2016). Parameters and simulations are in
    their own units. `transform` and `context_transform` standardize them, are fitted on the training rows, and are saved with
    the density. For simulations that are expensive, or were made elsewhere, use a `Table` with a context.

    Args:
        simulate: function of parameters `(n, D)` that returns simulations `(n, ...)`, a tensor or an array, which are flattened. It gets
            `generator=` if it takes that; otherwise torch's, numpy's and Python's generators are seeded.
        prior: distribution of the parameters, or their ranges.
        num_simulations: number of simulations, a tenth of them for validation.
        num_test: number of further simulations, for the test.
        batch_size: rows a training step, in each process.
        eval_batch_size: rows a validation or test step; `batch_size` if None.
        seed: of all simulations.

    Attributes:
        columns: names of the parameters.
        context_columns: names of the entries of a simulation.

    Raises:
        DataError: there are too few simulations, the prior is no prior, or simulations are of another number, not finite or constant.

    Example:
        >>> data = Simulator(lambda p: p.square() + torch.randn(len(p), 1), {"rate": (0, 2)}, 100, 20)
        >>> parameters, simulation = data.test[0]
        >>> data.columns, simulation.shape
        (['rate'], torch.Size([1]))
    """

    def __init__(
        self,
        simulate: Callable[..., Any],
        prior: Prior,
        num_simulations: int = 10_000,
        num_test: int = 2_000,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if num_simulations < 20 or num_test < 2:
            raise DataError(
                f"num_simulations must be at least 20 and num_test at least 2, but they are {num_simulations} and {num_test}"
            )
        generator = Generator().manual_seed(seed)
        with isolate_rng():
            L.seed_everything(seed, verbose=False)
            parameters, self.columns = _drawn(prior, num_simulations + num_test, generator)
            simulations = _simulated(simulate, parameters, generator)
        sizes = [num_simulations - num_simulations // 10, num_simulations // 10, num_test]
        train, seen = parameters[: sizes[0]], simulations[: sizes[0]]
        for what, rows in {"the prior's parameter": train, "the simulations' entry": seen}.items():
            if constant := (rows.std(dim=0) == 0).nonzero().flatten().tolist():
                raise DataError(
                    f"{what} {', '.join(str(i + 1) for i in constant[:10])} is constant. Leave out what does not vary"
                )
        self.transform = Affine(train.mean(dim=0), train.std(dim=0))
        self.context_transform = Affine(seen.mean(dim=0), seen.std(dim=0))
        splits = zip(parameters.split(sizes), simulations.split(sizes), strict=True)
        self.train, self.val, self.test = (Rows(x, context=context) for x, context in splits)
        self.event_shape, self.context_features = (parameters.shape[1],), simulations.shape[1]
        self.context_columns = [f"observation_{i + 1}" for i in range(self.context_features)]


def _drawn(prior: Prior, count: int, generator: Generator) -> tuple[Tensor, list[str]]:
    """Parameters `(count, D)`, and their names."""
    if isinstance(prior, Distribution):
        drawn = prior.sample((count,))
        if drawn.ndim != 2 or not drawn.isfinite().all():
            raise DataError(
                f"the prior must be a distribution of finite vectors, but its samples have shape {tuple(drawn.shape[1:])}. "
                "Use torch.distributions.Independent to make vectors of numbers"
            )
        return drawn, [f"parameter_{i + 1}" for i in range(drawn.shape[1])]
    if isinstance(prior, str) or not isinstance(prior, Mapping | Sequence) or not prior:
        raise DataError(f"prior must be ranges, such as [[-1,1],[0,3]] or {{rate: [0,3]}}, but is {prior!r}")
    named = prior if isinstance(prior, Mapping) else {f"parameter_{i + 1}": it for i, it in enumerate(prior)}
    try:
        ends = [checked_range(f"the prior of {name}", pair) for name, pair in named.items()]
    except ValueError as error:
        raise DataError(str(error)) from error
    low, high = torch.tensor(ends, device="cpu").T
    uniform = torch.rand(count, len(ends), generator=generator, device="cpu")
    return low + (high - low) * uniform, [str(name) for name in named]


def _simulated(simulate: Callable[..., Any], parameters: Tensor, generator: Generator) -> Tensor:
    """Simulations `(n, features)`, float32."""
    try:
        seeded = "generator" in inspect.signature(simulate).parameters
    except ValueError:  # some built-in functions have no signature
        seeded = False
    made = simulate(parameters.clone(), **({"generator": generator} if seeded else {}))
    try:
        found = torch.as_tensor(made, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"simulate must return a tensor or an array, but returned a {type(made).__name__}") from error
    if found.ndim == 0 or len(found) != len(parameters) or found[0].numel() == 0:
        raise DataError(
            f"simulate must return one simulation a row, ({len(parameters)}, ...) for {len(parameters)} parameters, but returned "
            f"shape {tuple(found.shape)}"
        )
    found = found.reshape(len(found), -1)
    if bad := (~found.isfinite().all(dim=1)).nonzero().flatten().tolist():
        raise DataError(
            f"{len(bad)} of {len(found)} simulations are not finite, such as that of the parameters {parameters[bad[0]].tolist()}. Give "
            "a narrower prior, or correct the simulator"
        )
    return found

"""Base of divflow's data modules: tensors split by seed, loaders for one process or several."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from divflow.data.batch import Batch, DataError, Parts
from divflow.data.dequantization import Dequantization, UniformDequantization, dequantize, quantize
from divflow.data.order import ShuffledRows, combined_seed
from divflow.energies import PairEnergy
from divflow.errors import check_count
from divflow.flow.transforms import Affine, Transform
from divflow.manifolds import Coordinates, Manifold

__all__ = [
    "Batch",
    "DataError",
    "Rows",
    "TensorDataModule",
    "check_finite",
    "listed",
]


class Rows(Dataset):
    """Rows of a tensor, fetched a batch at a time, each with or without a context and a weight.

    Attributes:
        numbers: numbers of the rows in their file; 0, 1, ... if there is none.
        context: context of each row, `(n, ...)`, or None.
        weight: weight of each row, `(n,)`, or None.
        epoch: epoch of training. Random numbers for a row may depend on it, and on nothing else that changes.
    """

    epoch = 0

    def __init__(
        self,
        rows: Tensor,
        numbers: Tensor | None = None,
        context: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        self.rows, self.context, self.weight = rows, context, weight
        self.numbers = torch.arange(len(rows), device="cpu") if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.rows)

    def taken(self, numbers: Tensor) -> "Rows":
        """Some of the rows, by their places."""
        context, weight = (None if it is None else it[numbers] for it in (self.context, self.weight))
        return Rows(self.rows[numbers], self.numbers[numbers], context, weight)

    def __getitem__(self, index: int) -> Batch:
        """One row: x, `(x, context)`, or all `Parts` if it has a weight."""
        return self._batch(index)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch of rows: x `(k, *event)`, pairs of x and context, or all `Parts` if rows have weights."""
        return self._batch(indices)

    def _batch(self, which: Any) -> Batch:
        x, context = self.rows[which], None if self.context is None else self.context[which]
        if self.weight is not None:
            return Parts(x, context, self.weight[which])
        return x if context is None else (x, context)


class TensorDataModule(L.LightningDataModule):
    """Base of divflow's data modules; batches are tensors `(k, *event)` of untransformed data, or these with a context.

    A subclass sets `train`, `val` and `test` (datasets such as `Rows`) and `transform` in `setup`. In several processes each trains on
    its share of every epoch. Evaluation divides the rows without repeating any, so that averages are those of one process.

    Attributes:
        event_shape: shape of one sample.
        transform: from the data to what the flow models, fitted on the training split.
        levels: number of values of discrete data n, which are made continuous, y = (n + u) / levels with noise u; bits per
            dimension depend on it. None for continuous data.
        dequantization: distribution of the noise u of discrete data.
        num_draws: draws of that noise for each row of the test.
        images: whether samples are drawn as a grid of images.
        context_features: number of features of the context; 0 for unconditional data.
        context_transform: standardization of contexts, fitted on the training split; None for none.
        context_range: the least and the largest training value of each feature of the context, of which a loaded density warns of
            others; None if they are not known.
        energy: energy of particles, towards whose Boltzmann density samples can be weighted; None for other data.
        num_weighted: samples of the model that the test weights.
        manifold: of which the data are points, in its ambient coordinates; their log-density is with respect to its volume. None for
            data of the whole space.
        coordinates: in which a file has these points, and samples are written; None for the ambient ones.

    Raises:
        ValueError: a batch size or a seed is not a whole number, or too small.
    """

    train: Rows
    val: Rows
    test: Rows
    event_shape: tuple[int, ...]
    levels: int | None = None
    dequantization: Dequantization = UniformDequantization()
    num_draws: int = 1
    images: bool = False
    context_features: int = 0
    context_transform: Affine | None = None
    context_range: list[list[float]] | None = None
    energy: PairEnergy | None = None
    num_weighted: int = 10_000
    manifold: Manifold | None = None
    coordinates: Coordinates | None = None

    def __init__(self, batch_size: int, eval_batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.seed = seed
        for name, least in {"batch_size": 1, "eval_batch_size": 1, "seed": 0}.items():
            check_count(f"data.{name}", getattr(self, name), least)
        self.transform: Transform = Affine()
        self._order_seed: int | None = None
        self._epoch = 0  # without a trainer, which counts them

    def log_prob(self, x: Tensor) -> Tensor | None:
        """True log-density of x in nats, `(k,)`, if it is known."""
        return None

    def score(self, x: Tensor) -> Tensor | None:
        """True score of x, grad log p(x), `(k, *event)`, if it is known."""
        return None

    @property
    def bit_per_dim(self) -> float | None:
        """One bit per dimension in nats, D log 2; None for data that are not discrete."""
        return None if self.levels is None else math.prod(self.event_shape) * math.log(2)

    def bits_per_dim(self, log_prob: Tensor, x: Tensor) -> Tensor | None:
        """An upper bound of -log2 P(n) / D for discrete data n, from their log-density at x; None for other data.

            -(log p(x) - log q(u)) / (D log 2) + log2(levels)      (see `Dequantization`)

        Args:
            log_prob: log-density of the batch, in nats, `(k,)`.
            x: the batch `(k, *event)`.
        """
        if self.levels is None or self.bit_per_dim is None:
            return None
        _, noise = quantize(x, self.levels)
        return (self.dequantization.log_density(noise) - log_prob) / self.bit_per_dim + math.log2(self.levels)

    def redrawn(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Discrete data of the batch x `(k, *event)` with new noise; other data unchanged."""
        if self.levels is None:
            return x
        values, _ = quantize(x, self.levels)
        return dequantize(values, self.levels, self.dequantization, generator)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; an incomplete last one is dropped unless it is the only one."""
        world, rank = self._processes()
        if self._order_seed is None:
            self._order_seed = combined_seed(self.seed, torch.initial_seed())
            if self.trainer is not None:
                self._order_seed = self.trainer.strategy.broadcast(self._order_seed)
        per_process = len(self.train) // world
        return DataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=ShuffledRows(self.train, (world, rank), self._order_seed, self.batch_size, self._position),
            drop_last=per_process >= self.batch_size,
            collate_fn=_as_it_is,
        )

    def state_dict(self) -> dict[str, Any]:
        """State from which a resumed run takes the rows in the same order."""
        return {"order_seed": self._order_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the order of an earlier run."""
        self._order_seed = state_dict["order_seed"]

    def _position(self) -> tuple[int, int]:
        """The epoch, and how many of its batches this process has taken."""
        if self.trainer is None:
            self._epoch += 1
            return self._epoch - 1, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def val_dataloader(self) -> DataLoader:
        """All validation rows, in order."""
        return self._evaluation_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        """All test rows, in order."""
        return self._evaluation_loader(self.test)

    def predict_dataloader(self) -> DataLoader:
        """All test rows, in order, for `trainer.predict`; for other rows, give it a loader."""
        return self._evaluation_loader(self.test)

    def _evaluation_loader(self, dataset: Rows) -> DataLoader:
        world, rank = self._processes()
        if len(dataset) < world:
            raise DataError(
                f"{len(dataset)} rows to evaluate are too few for {world} processes. Use fewer devices or more data"
            )
        sampler = UnrepeatedDistributedSampler(dataset, world, rank, shuffle=False) if world > 1 else None
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=_as_it_is)

    def _processes(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


def _as_it_is(batch: Any) -> Any:
    return batch


def check_finite(rows: Tensor, names: Sequence[str] | None = None) -> None:
    """Refuse rows with NaN or infinite entries.

    Raises:
        DataError: with the numbers of the first such rows, and their columns if these have names.
    """
    bad = ~torch.isfinite(rows.flatten(1))
    if bad.any():
        where = bad.any(dim=1).nonzero().flatten().tolist()
        columns = [] if names is None else [names[i] for i in bad.any(dim=0).nonzero().flatten().tolist()]
        missing = " Missing values are NaN here." if rows.isnan().any() else ""
        raise DataError(
            f"{len(where)} of {len(rows)} rows are not finite: row {', '.join(map(str, where[:10]))}"
            f"{', ...' if len(where) > 10 else ''} (counted from 0)"
            f"{f', column {chr(44).join(columns)}' if columns else ''}.{missing} Drop them or fill them in"
            f"{', or leave the column out, by data.columns=[...]' if columns else ''}"
        )


def listed(names: Sequence[str]) -> str:
    """The first ten of these, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

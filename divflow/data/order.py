"""The order of training rows: a function of seed and epoch, gone on with from wherever a run stands in its epoch."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["ShuffledRows", "combined_seed"]


def combined_seed(*numbers: int) -> int:
    """A seed for torch, another for each sequence of numbers that are not negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class ShuffledRows(DistributedSampler):
    """The rows of a dataset in an order of each epoch, divided among processes.

    Args:
        dataset: the rows.
        processes: how many, and which of them this is.
        seed: of the order.
        batch_size: rows a batch.
        position: the epoch, and how many of its batches have been taken.
    """

    dataset: Any  # whose rows may depend on its `epoch`, as those of `Rows`

    def __init__(
        self,
        dataset: Dataset,
        processes: tuple[int, int],
        seed: int,
        batch_size: int,
        position: Callable[[], tuple[int, int]],
    ) -> None:
        super().__init__(dataset, *processes, shuffle=True, seed=seed)
        self._batch_size, self._position = batch_size, position

    def __iter__(self) -> Iterator[int]:
        """The rows that are left of the epoch; found when the first of them is asked for."""
        epoch, batches = self._position()
        self.dataset.epoch = epoch
        # torch's own order is that of seed + epoch, in which seeds would share epochs.
        self.epoch = combined_seed(self.seed, epoch) - self.seed
        yield from islice(super().__iter__(), batches * self._batch_size, None)

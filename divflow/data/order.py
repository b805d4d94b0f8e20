"""Order of training rows: a function of seed and epoch, so that a run can resume within an epoch."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["ShuffledRows", "combined_seed"]


def combined_seed(*numbers: int) -> int:
    """A seed for torch that differs for each sequence of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class ShuffledRows(DistributedSampler):
    """Rows of a dataset in a random order for each epoch, divided among processes.

    Args:
        dataset: the rows.
        processes: number of processes, and the number of this one.
        seed: of the order.
        batch_size: rows a batch.
        position: epoch, and number of its batches that have been taken.
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
        """Rows that are left of the epoch; the position is read when the first of them is asked for."""
        epoch, batches = self._position()
        self.dataset.epoch = epoch
        # torch's own order is that of seed + epoch, in which seeds would share epochs.
        self.epoch = combined_seed(self.seed, epoch) - self.seed
        yield from islice(super().__iter__(), batches * self._batch_size, None)

"""The default generators, lent, so that what draws from them gets a seed's numbers."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

__all__ = ["seeded"]

# The default generator is one process's: without a lock two threads would draw from each other's seeds.
_LENT = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Within it the default generators of the CPU and of these devices go on from a seed."""
    with _LENT, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

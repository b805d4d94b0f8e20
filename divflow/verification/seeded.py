"""The default generators, lent, so that what draws from them gets the numbers of a seed."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

__all__ = ["seeded"]

# The default generator belongs to the process: without a lock two threads would draw from each other's seeds.
_LENT = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Seed the default generators of the CPU and of these devices, and restore them at the end.

    Args:
        seed: the seed.
        devices: other devices than the CPU.
    """
    with _LENT, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

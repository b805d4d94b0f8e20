"""The default generators: lent, so that what draws from them gets a seed's numbers, and set back to a state."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["rng_states", "seeded", "set_rng_states"]

# The default generator is one process's: without a lock two threads would draw from each other's seeds.
_LENT = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Within it the default generators of the CPU and of these devices go on from a seed."""
    with _LENT, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def rng_states(x: Tensor) -> list[Tensor]:
    """The states of the default generators that a field of x may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])


def set_rng_states(states: list[Tensor]) -> None:
    """Go back to these states."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])

"""The states of the default random generators."""

import torch
from torch import Tensor

__all__ = ["rng_states", "set_rng_states"]


def rng_states(x: Tensor) -> list[Tensor]:
    """The states of the default generators that a field of x may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])


def set_rng_states(states: list[Tensor]) -> None:
    """Go back to these states."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])

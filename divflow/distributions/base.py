"""What may be the base of a flow: any distribution of torch, and what one says of itself that lives on a subspace."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal

from divflow.errors import DivflowError
from divflow.operators.field import Field

__all__ = ["BaseError", "OnSubspace", "standard_normal"]


class BaseError(DivflowError, ValueError):
    """A base density was given what it is not for."""


@runtime_checkable
class OnSubspace(Protocol):
    """What a distribution says of itself whose density is one on a subspace of its events, such as `MeanFreeNormal`.

    It refuses states off the subspace by itself, so that it goes on validating as a base, where others have the density zero. A
    distribution that says nothing of this has its density over all entries of an event.

    Attributes:
        mean_free: whether the subspace is that of particles `(n, d)` whose centre of mass is zero.
    """

    mean_free: bool

    def check_states(self, value: Tensor) -> None:
        """Refuse states `(*sample, *event)` off the subspace, of the base or of a flow's data.

        Raises:
            BaseError: naming how far off they are.
        """

    def check_velocity(self, velocity: Field, t: float, x: Tensor) -> None:
        """Refuse a velocity that leaves the subspace from states x `(k, *event)` on it; called once before training.

        Raises:
            BaseError: naming how fast it leaves.
        """


def standard_normal(event_shape: Size, **settings: Any) -> Distribution:
    """The standard normal over events of a shape, of tensors of a dtype and a device."""
    loc, scale = torch.zeros(event_shape, **settings), torch.ones(event_shape, **settings)
    return Independent(Normal(loc, scale, validate_args=False), len(event_shape))

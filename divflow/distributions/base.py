"""What may be the base of a flow: any distribution of torch, and the protocol of one that lives on a subspace."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal

from divflow.errors import DivflowError
from divflow.operators.field import Field

__all__ = ["BaseError", "OnSubspace", "standard_normal"]


class BaseError(DivflowError, ValueError):
    """A base density is used for something that it does not serve."""


@runtime_checkable
class OnSubspace(Protocol):
    """The protocol of a distribution whose density is one on a subspace of its events, such as `MeanFreeNormal`.

    It refuses states off the subspace itself, so it keeps validating as a base, unlike other distributions, whose density
    is zero there. A distribution without these attributes has its density over all entries of an event.

    Attributes:
        mean_free: whether the subspace is that of particles `(n, d)` whose centre of mass is zero.
    """

    mean_free: bool

    def check_states(self, value: Tensor) -> None:
        """Refuse states off the subspace, of the base or of a flow's data.

        Args:
            value: states `(*sample, *event)`.

        Raises:
            BaseError: with their distance from it.
        """

    def check_velocity(self, velocity: Field, t: float, x: Tensor) -> None:
        """Refuse a velocity that leaves the subspace; called once before training.

        Args:
            velocity: the field v(t, x).
            t: the time at which it is tested.
            x: states on the subspace, `(k, *event)`.

        Raises:
            BaseError: with the speed at which it leaves.
        """


def standard_normal(event_shape: Size, **settings: Any) -> Distribution:
    """Make the standard normal over events of a shape.

    Args:
        event_shape: shape of one sample.
        **settings: dtype and device of its tensors.
    """
    loc, scale = torch.zeros(event_shape, **settings), torch.ones(event_shape, **settings)
    return Independent(Normal(loc, scale, validate_args=False), len(event_shape))

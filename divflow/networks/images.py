"""Check of images for networks of several resolutions."""

from collections.abc import Sequence

from divflow.networks.conditioning import NetworkError

__all__ = ["image_shape"]


def image_shape(event_shape: int | Sequence[int], levels: int, network: str) -> tuple[int, int, int]:
    """Event shape as (channels, height, width), after a check that it can be halved between the levels.

    Args:
        event_shape: shape of one sample, without the batch.
        levels: number of resolutions.
        network: name of the network, for messages.

    Raises:
        NetworkError: there is no level, the event is no image, or its height or width is no multiple of `2^(levels - 1)`.
    """
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if levels < 1:
        raise NetworkError(f"{network} needs the channels of at least one level, but channels is empty")
    if len(shape) != 3:
        raise NetworkError(
            f"{network} needs events (channels, height, width), but the event shape is {shape}. Use MLP for vectors, "
            "ConvNet for one or three spatial dimensions, or give images a channel dimension"
        )
    step = 2 ** (levels - 1)
    if shape[1] % step or shape[2] % step:
        raise NetworkError(
            f"{network} of {levels} levels needs a height and width divisible by {step}, but the event shape is {shape}. "
            "Use fewer levels, or pad the images"
        )
    return shape

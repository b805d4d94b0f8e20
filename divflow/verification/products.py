"""Products with a field's Jacobian, whose errors are told."""

import contextlib
from collections.abc import Iterator

from divflow.errors import FieldError

__all__ = ["reentrant_refused"]


@contextlib.contextmanager
def reentrant_refused() -> Iterator[None]:
    """Around products with a field's Jacobian.

    Raises:
        FieldError: in place of torch's error, which is of another use.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise FieldError(
            "the field is checkpointed by torch.utils.checkpoint with use_reentrant=True, through which no products with a "
            "Jacobian go; use use_reentrant=False (gradient_checkpointing_kwargs of transformers)"
        ) from error
